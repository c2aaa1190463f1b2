//! Commands on keys, whatever their value.

use super::{Call, Outcome, Value};
use crate::resp::reply::{self, Refusal, bulk_size};

pub(super) fn del(call: &mut Call<'_>) -> Outcome {
    let mut removed = 0;
    for key in call.args.from(1) {
        if call.find(key).is_some() {
            removed += i64::from(call.world.store.remove(key));
        }
    }
    call.integer(removed)
}

pub(super) fn exists(call: &mut Call<'_>) -> Outcome {
    let mut found = 0;
    for key in call.args.from(1) {
        found += i64::from(call.find(key).is_some());
    }
    call.integer(found)
}

pub(super) fn expire(call: &mut Call<'_>) -> Outcome {
    expire_in(call, 1000, "expire")
}

pub(super) fn pexpire(call: &mut Call<'_>) -> Outcome {
    expire_in(call, 1, "pexpire")
}

fn expire_in(call: &mut Call<'_>, scale: i64, name: &'static str) -> Outcome {
    let refused = Refusal::ExpireTime(name);
    let delta_ms = call.integer_arg(2)?.checked_mul(scale).ok_or(refused)?;
    let at_ms = delta_ms.checked_add_unsigned(call.now_ms).ok_or(refused)?;
    let condition = match call.args.len() {
        3 => Condition::Always,
        4 => Condition::parse(call.arg(3)).ok_or(Refusal::Syntax)?,
        _ => return Err(Refusal::Syntax),
    };
    let (key, now_ms) = (call.arg(1), call.now_ms);
    let Some(entry) = call.find(key) else {
        return call.integer(0);
    };
    let at_ms = at_ms.max(0) as u64;
    if !condition.holds(entry.expires_ms, at_ms) {
        return call.integer(0);
    }
    entry.expires_ms = Some(at_ms);
    if at_ms <= now_ms {
        call.world.store.remove(key);
    }
    call.integer(1)
}

/// When EXPIRE takes effect.
enum Condition {
    Always,
    IfNone,
    IfSome,
    IfLater,
    IfSooner,
}

impl Condition {
    fn parse(word: &[u8]) -> Option<Self> {
        match word.to_ascii_lowercase().as_slice() {
            b"nx" => Some(Self::IfNone),
            b"xx" => Some(Self::IfSome),
            b"gt" => Some(Self::IfLater),
            b"lt" => Some(Self::IfSooner),
            _ => None,
        }
    }

    fn holds(&self, old_ms: Option<u64>, new_ms: u64) -> bool {
        match self {
            Self::Always => true,
            Self::IfNone => old_ms.is_none(),
            Self::IfSome => old_ms.is_some(),
            Self::IfLater => old_ms.is_some_and(|old_ms| new_ms > old_ms),
            Self::IfSooner => old_ms.is_none_or(|old_ms| new_ms < old_ms),
        }
    }
}

pub(super) fn ttl(call: &mut Call<'_>) -> Outcome {
    let left_ms = left_ms(call);
    call.integer(if left_ms < 0 {
        left_ms
    } else {
        (left_ms + 500) / 1000
    })
}

pub(super) fn pttl(call: &mut Call<'_>) -> Outcome {
    let left_ms = left_ms(call);
    call.integer(left_ms)
}

/// Milliseconds to live; -1 for ever, -2 no such key.
fn left_ms(call: &mut Call<'_>) -> i64 {
    let now_ms = call.now_ms;
    match call.find(call.arg(1)).map(|entry| entry.expires_ms) {
        None => -2,
        Some(None) => -1,
        Some(Some(at_ms)) => at_ms.saturating_sub(now_ms) as i64,
    }
}

pub(super) fn persist(call: &mut Call<'_>) -> Outcome {
    let had = call
        .find(call.arg(1))
        .is_some_and(|entry| entry.expires_ms.take().is_some());
    call.integer(i64::from(had))
}

pub(super) fn dbsize(call: &mut Call<'_>) -> Outcome {
    call.integer(call.world.store.map.len() as i64)
}

pub(super) fn flushall(call: &mut Call<'_>) -> Outcome {
    call.world.store.clear();
    call.ok()
}

pub(super) fn type_of(call: &mut Call<'_>) -> Outcome {
    let name = match call.find(call.arg(1)).map(|entry| &entry.value) {
        None => "none",
        Some(Value::Text(_)) => "string",
        Some(Value::List(_)) => "list",
        Some(Value::Set(_)) => "set",
    };
    reply::simple(call.out, name);
    Ok(())
}

/// A random key, by the time stamp counter: a natural divergence.
pub(super) fn randomkey(call: &mut Call<'_>) -> Outcome {
    let random = call.world.random();
    let now_ms = call.now_ms;
    let Call { world, out, .. } = call;
    let keys = &world.store.map;
    let start = if keys.is_empty() {
        0
    } else {
        (random % keys.len() as u64) as usize
    };
    let alive = |index: &usize| keys[*index].expires_ms.is_none_or(|at_ms| at_ms > now_ms);
    match (start..keys.len())
        .chain(0..start)
        .find(alive)
        .and_then(|index| keys.get_index(index))
    {
        Some((key, _)) => reply::bulk(out, key),
        None => reply::nil(out),
    }
    Ok(())
}

pub(super) fn keys(call: &mut Call<'_>) -> Outcome {
    let pattern = call.arg(1);
    let now_ms = call.now_ms;
    let matching = |world: &crate::world::World, visit: &mut dyn FnMut(&[u8])| {
        for (key, entry) in &world.store.map {
            if entry.expires_ms.is_none_or(|at_ms| at_ms > now_ms) && matches(pattern, key) {
                visit(key);
            }
        }
    };
    let (mut count, mut size) = (0, 16);
    matching(call.world, &mut |key| {
        count += 1;
        size += bulk_size(key.len());
    });
    call.admit_reply(size)?;
    let Call { world, out, .. } = call;
    reply::array(out, count);
    matching(world, &mut |key| reply::bulk(out, key));
    Ok(())
}

/// Redis's glob: `*`, `?`, `[a-z]`, `[^a]`, `\x`. Takes time of the order of the product of the
/// lengths at most.
pub(super) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry = None;
    loop {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            retry = Some((p, t));
            continue;
        }
        if t == text.len() && p >= pattern.len() {
            return true;
        }
        let step = if t < text.len() {
            match_one(&pattern[p..], text[t])
        } else {
            None
        };
        match (step, retry) {
            (Some(width), _) => (p, t) = (p + width, t + 1),
            (None, Some((after_star, from))) if from < text.len() => {
                retry = Some((after_star, from + 1));
                (p, t) = (after_star, from + 1);
            }
            _ => return false,
        }
    }
}

/// Matches one byte; gives the width of the pattern element.
fn match_one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern {
        [b'?', ..] => Some(1),
        [b'[', ..] => match_class(pattern, byte),
        [b'\\', escaped, ..] => (escaped == byte).then_some(2),
        [literal, ..] => (literal == byte).then_some(1),
        [] => None,
    }
}

fn match_class(pattern: &[u8], byte: u8) -> Option<usize> {
    let inverted = pattern.get(1) == Some(&b'^');
    let mut i = if inverted { 2 } else { 1 };
    let mut found = false;
    loop {
        match *pattern.get(i..)? {
            [] => break,
            [b']', ..] => {
                i += 1;
                break;
            }
            [b'\\', escaped, ..] => {
                found |= escaped == byte;
                i += 2;
            }
            [low, b'-', high, ..] => {
                found |= (low.min(high)..=low.max(high)).contains(&byte);
                i += 3;
            }
            [literal, ..] => {
                found |= literal == byte;
                i += 1;
            }
        }
    }
    (found != inverted).then_some(i)
}
