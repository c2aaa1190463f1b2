//! Commands on lists.

use super::{Bytes, Call, ELEMENT_COST, Outcome, Value};
use crate::resp::reply::{self, Refusal, bulk_size};
use alloc::collections::VecDeque;

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Left,
    Right,
}

pub(super) fn lpush(call: &mut Call<'_>) -> Outcome {
    push(call, End::Left)
}

pub(super) fn rpush(call: &mut Call<'_>) -> Outcome {
    push(call, End::Right)
}

fn push(call: &mut Call<'_>, end: End) -> Outcome {
    let key = call.arg(1);
    if call.find_list(key)?.is_none() {
        call.world
            .store
            .insert(key, Value::List(VecDeque::new()), None);
    }
    let items = call.args.from(2);
    let Some(list) = call.find_list(key)? else {
        return call.integer(0);
    };
    let mut added = 0;
    for item in items {
        added += item.len() + ELEMENT_COST;
        match end {
            End::Left => list.push_front(Bytes::from(item)),
            End::Right => list.push_back(Bytes::from(item)),
        }
    }
    let len = list.len();
    call.world.store.recost(0, added);
    call.integer(len as i64)
}

pub(super) fn lpop(call: &mut Call<'_>) -> Outcome {
    pop(call, End::Left, "lpop")
}

pub(super) fn rpop(call: &mut Call<'_>) -> Outcome {
    pop(call, End::Right, "rpop")
}

fn pop(call: &mut Call<'_>, end: End, name: &'static str) -> Outcome {
    let count = match call.args.len() {
        2 => None,
        3 => Some(
            call.integer_arg(2)
                .ok()
                .and_then(|count| usize::try_from(count).ok())
                .ok_or(Refusal::NotPositive)?,
        ),
        _ => return Err(Refusal::Arity(name)),
    };
    let key = call.arg(1);
    let Some(list) = call.find_list(key)? else {
        match count {
            None => reply::nil(call.out),
            Some(_) => reply::nil_array(call.out),
        }
        return Ok(());
    };
    let n = count.unwrap_or(1).min(list.len());
    let ends = (0..n).map(|i| match end {
        End::Left => &list[i],
        End::Right => &list[list.len() - 1 - i],
    });
    let size = ends.map(|item| bulk_size(item.len())).sum::<usize>() + 16;
    call.admit_reply(size)?;
    if count.is_some() {
        reply::array(call.out, n);
    }
    take(call, key, end, n)
}

/// Removes and replies `n` items; removes the list when it gets empty.
fn take(call: &mut Call<'_>, key: &[u8], end: End, n: usize) -> Outcome {
    let mut removed = 0;
    for _ in 0..n {
        let item = call.find_list(key)?.and_then(|list| match end {
            End::Left => list.pop_front(),
            End::Right => list.pop_back(),
        });
        if let Some(item) = item {
            removed += item.len() + ELEMENT_COST;
            reply::bulk(call.out, &item);
        }
    }
    call.world.store.recost(removed, 0);
    if call.find_list(key)?.is_some_and(|list| list.is_empty()) {
        call.world.store.remove(key);
    }
    Ok(())
}

pub(super) fn llen(call: &mut Call<'_>) -> Outcome {
    let len = call.find_list(call.arg(1))?.map_or(0, |list| list.len());
    call.integer(len as i64)
}

pub(super) fn lrange(call: &mut Call<'_>) -> Outcome {
    let (first, last) = (call.integer_arg(2)?, call.integer_arg(3)?);
    let key = call.arg(1);
    let Some(list) = call.find_list(key)? else {
        reply::array(call.out, 0);
        return Ok(());
    };
    let len = list.len() as i64;
    let from_end = |index: i64| {
        if index < 0 {
            index.saturating_add(len)
        } else {
            index
        }
    };
    let first = from_end(first).max(0);
    let last = from_end(last).min(len - 1);
    if first > last {
        reply::array(call.out, 0);
        return Ok(());
    }
    let (first, last) = (first as usize, last as usize);
    let size = list
        .range(first..=last)
        .map(|item| bulk_size(item.len()))
        .sum::<usize>()
        + 16;
    call.admit_reply(size)?;
    reply::array(call.out, last - first + 1);
    let Call {
        world, out, now_ms, ..
    } = call;
    if let Some(entry) = world.store.find(key, *now_ms)
        && let Value::List(list) = &entry.value
    {
        for item in list.range(first..=last) {
            reply::bulk(out, item);
        }
    }
    Ok(())
}
