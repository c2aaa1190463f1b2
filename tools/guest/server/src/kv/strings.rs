//! Commands on string values.

use super::{Call, Outcome, Value, admit_reply};
use crate::resp::reply::{self, Refusal, bulk_size};
use crate::resp::scan::{BULK_MAX, parse_integer};
use alloc::vec::Vec;

pub(super) fn get(call: &mut Call<'_>) -> Outcome {
    write_text(call, call.arg(1))
}

/// Replies with the text at `key`, nil when there is none.
fn write_text(call: &mut Call<'_>, key: &[u8]) -> Outcome {
    let Call {
        world, out, now_ms, ..
    } = call;
    let size = match world.store.find(key, *now_ms).map(|entry| &entry.value) {
        None => return call.nil(),
        Some(Value::Text(text)) => bulk_size(text.len()),
        Some(_) => return Err(Refusal::WrongType),
    };
    admit_reply(world, size)?;
    if let Some(Value::Text(text)) = world.store.find(key, *now_ms).map(|entry| &entry.value) {
        reply::bulk(out, text);
    }
    Ok(())
}

pub(super) fn getdel(call: &mut Call<'_>) -> Outcome {
    write_text(call, call.arg(1))?;
    call.world.store.remove(call.arg(1));
    Ok(())
}

pub(super) fn getset(call: &mut Call<'_>) -> Outcome {
    write_text(call, call.arg(1))?;
    store_text(call, call.arg(1), call.arg(2), None);
    Ok(())
}

pub(super) fn strlen(call: &mut Call<'_>) -> Outcome {
    let len = call.find_text(call.arg(1))?.map_or(0, |text| text.len());
    call.integer(len as i64)
}

fn store_text(call: &mut Call<'_>, key: &[u8], text: &[u8], expires_ms: Option<u64>) {
    let now_ms = call.now_ms;
    let store = &mut call.world.store;
    // Overwriting in place keeps the allocation, and a plain SET of the same size touches no other
    // page.
    if let Some(entry) = store.find(key, now_ms)
        && let Value::Text(old) = &mut entry.value
        && old.capacity() >= text.len()
        && old.capacity() <= 2 * text.len() + 64
    {
        old.clear();
        old.extend_from_slice(text);
        entry.expires_ms = expires_ms;
        return;
    }
    store.insert(key, Value::Text(text.to_vec()), expires_ms);
}

#[derive(Default)]
struct SetOptions {
    only_if_absent: bool,
    only_if_present: bool,
    keep_ttl: bool,
    get: bool,
    expires_ms: Option<u64>,
}

impl SetOptions {
    fn parse(call: &Call<'_>) -> Result<Self, Refusal> {
        let mut options = Self::default();
        let mut i = 3;
        while i < call.args.len() {
            match call.arg(i).to_ascii_lowercase().as_slice() {
                b"nx" => options.only_if_absent = true,
                b"xx" => options.only_if_present = true,
                b"keepttl" => options.keep_ttl = true,
                b"get" => options.get = true,
                unit @ (b"ex" | b"px" | b"exat" | b"pxat")
                    if options.expires_ms.is_none() && i + 1 < call.args.len() =>
                {
                    i += 1;
                    let value = call.integer_arg(i)?;
                    let scale = if unit.starts_with(b"e") { 1000 } else { 1 };
                    let base = if unit.len() == 4 { 0 } else { call.now_ms };
                    options.expires_ms = Some(expiry(value, scale, base, "set")?);
                }
                _ => return Err(Refusal::Syntax),
            }
            i += 1;
        }
        let both = options.only_if_absent && options.only_if_present;
        if both || (options.keep_ttl && options.expires_ms.is_some()) {
            return Err(Refusal::Syntax);
        }
        Ok(options)
    }
}

/// The expiry time in ms since 1970 of a positive `value` in units of `scale` ms from `base_ms`.
fn expiry(value: i64, scale: i64, base_ms: u64, command: &'static str) -> Result<u64, Refusal> {
    let refused = Refusal::ExpireTime(command);
    if value <= 0 {
        return Err(refused);
    }
    let from_base = value.checked_mul(scale).ok_or(refused)?;
    from_base
        .checked_add_unsigned(base_ms)
        .map(|at_ms| at_ms as u64)
        .ok_or(refused)
}

pub(super) fn set(call: &mut Call<'_>) -> Outcome {
    let options = SetOptions::parse(call)?;
    let key = call.arg(1);
    let found = call.find(key).map(|entry| entry.expires_ms);
    if options.get {
        write_text(call, key)?;
    }
    let refused =
        (options.only_if_absent && found.is_some()) || (options.only_if_present && found.is_none());
    if !refused {
        let kept = if options.keep_ttl {
            found.flatten()
        } else {
            None
        };
        store_text(call, key, call.arg(2), options.expires_ms.or(kept));
    }
    match (options.get, refused) {
        (true, _) => Ok(()),
        (false, true) => call.nil(),
        (false, false) => call.ok(),
    }
}

pub(super) fn setex(call: &mut Call<'_>) -> Outcome {
    let expires_ms = expiry(call.integer_arg(2)?, 1000, call.now_ms, "setex")?;
    store_text(call, call.arg(1), call.arg(3), Some(expires_ms));
    call.ok()
}

pub(super) fn psetex(call: &mut Call<'_>) -> Outcome {
    let expires_ms = expiry(call.integer_arg(2)?, 1, call.now_ms, "psetex")?;
    store_text(call, call.arg(1), call.arg(3), Some(expires_ms));
    call.ok()
}

pub(super) fn setnx(call: &mut Call<'_>) -> Outcome {
    let absent = call.find(call.arg(1)).is_none();
    if absent {
        store_text(call, call.arg(1), call.arg(2), None);
    }
    call.integer(i64::from(absent))
}

pub(super) fn incr(call: &mut Call<'_>) -> Outcome {
    add(call, 1)
}

pub(super) fn decr(call: &mut Call<'_>) -> Outcome {
    add(call, -1)
}

pub(super) fn incrby(call: &mut Call<'_>) -> Outcome {
    add(call, call.integer_arg(2)?)
}

pub(super) fn decrby(call: &mut Call<'_>) -> Outcome {
    let delta = call.integer_arg(2)?;
    add(call, delta.checked_neg().ok_or(Refusal::DecrementOverflow)?)
}

fn add(call: &mut Call<'_>, delta: i64) -> Outcome {
    let key = call.arg(1);
    let old = match call.find_text(key)? {
        Some(text) => parse_integer(text).ok_or(Refusal::NotInteger)?,
        None => 0,
    };
    let new = old.checked_add(delta).ok_or(Refusal::Overflow)?;
    let mut digits = Vec::with_capacity(20);
    reply::decimal(&mut digits, new);
    match call.find_text(key)? {
        Some(text) => {
            let before = text.capacity();
            text.clear();
            text.extend_from_slice(&digits);
            let after = text.capacity();
            call.world.store.recost(before, after);
        }
        None => call.world.store.insert(key, Value::Text(digits), None),
    }
    call.integer(new)
}

pub(super) fn append(call: &mut Call<'_>) -> Outcome {
    let (key, more) = (call.arg(1), call.arg(2));
    let len = match call.find_text(key)? {
        Some(text) => {
            if text.len() + more.len() > BULK_MAX {
                return Err(Refusal::TooLong);
            }
            let before = text.capacity();
            text.extend_from_slice(more);
            let (after, len) = (text.capacity(), text.len());
            call.world.store.recost(before, after);
            len
        }
        None => {
            call.world
                .store
                .insert(key, Value::Text(more.to_vec()), None);
            more.len()
        }
    };
    call.integer(len as i64)
}

pub(super) fn mget(call: &mut Call<'_>) -> Outcome {
    let Call {
        args,
        world,
        out,
        now_ms,
    } = call;
    let mut size = 16;
    for key in args.from(1) {
        size += match world.store.find(key, *now_ms).map(|entry| &entry.value) {
            Some(Value::Text(text)) => bulk_size(text.len()),
            _ => bulk_size(0),
        };
    }
    admit_reply(world, size)?;
    reply::array(out, args.len() - 1);
    for key in args.from(1) {
        match world.store.find(key, *now_ms).map(|entry| &entry.value) {
            Some(Value::Text(text)) => reply::bulk(out, text),
            _ => reply::nil(out),
        }
    }
    Ok(())
}

pub(super) fn mset(call: &mut Call<'_>) -> Outcome {
    if call.args.len().is_multiple_of(2) {
        return Err(Refusal::Arity("mset"));
    }
    for i in (1..call.args.len()).step_by(2) {
        store_text(call, call.arg(i), call.arg(i + 1), None);
    }
    call.ok()
}
