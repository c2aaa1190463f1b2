//! Commands on sets.
//!
//! Members are kept in the order of insertion, but a removal puts the last member into the gap: the
//! order is the same on both guests as long as they execute the same commands and pop the same
//! members.

use super::{Bytes, Call, MEMBER_COST, Outcome, Value};
use crate::resp::reply::{self, Refusal, bulk_size};
use indexmap::IndexSet;

pub(super) fn sadd(call: &mut Call<'_>) -> Outcome {
    let key = call.arg(1);
    if call.find_set(key)?.is_none() {
        call.world
            .store
            .insert(key, Value::Set(IndexSet::default()), None);
    }
    let members = call.args.from(2);
    let (mut added, mut cost) = (0, 0);
    if let Some(set) = call.find_set(key)? {
        for member in members {
            if !set.contains(member) {
                set.insert(Bytes::from(member));
                added += 1;
                cost += member.len() + MEMBER_COST;
            }
        }
    }
    call.world.store.recost(0, cost);
    call.integer(added)
}

pub(super) fn srem(call: &mut Call<'_>) -> Outcome {
    let key = call.arg(1);
    let members = call.args.from(2);
    let (mut removed, mut cost) = (0, 0);
    if let Some(set) = call.find_set(key)? {
        for member in members {
            if set.swap_remove(member) {
                removed += 1;
                cost += member.len() + MEMBER_COST;
            }
        }
    }
    shrink(call, key, cost)?;
    call.integer(removed)
}

/// Accounts for removed members; removes the set when it is empty.
fn shrink(call: &mut Call<'_>, key: &[u8], cost: usize) -> Outcome {
    call.world.store.recost(cost, 0);
    if call.find_set(key)?.is_some_and(|set| set.is_empty()) {
        call.world.store.remove(key);
    }
    Ok(())
}

pub(super) fn scard(call: &mut Call<'_>) -> Outcome {
    let len = call.find_set(call.arg(1))?.map_or(0, |set| set.len());
    call.integer(len as i64)
}

pub(super) fn sismember(call: &mut Call<'_>) -> Outcome {
    let member = call.arg(2);
    let found = call
        .find_set(call.arg(1))?
        .is_some_and(|set| set.contains(member));
    call.integer(i64::from(found))
}

pub(super) fn smembers(call: &mut Call<'_>) -> Outcome {
    let key = call.arg(1);
    let size = match call.find_set(key)? {
        Some(set) => {
            set.iter()
                .map(|member| bulk_size(member.len()))
                .sum::<usize>()
                + 16
        }
        None => 16,
    };
    call.admit_reply(size)?;
    let Call {
        world, out, now_ms, ..
    } = call;
    match world.store.find(key, *now_ms).map(|entry| &entry.value) {
        Some(Value::Set(set)) => {
            reply::array(out, set.len());
            set.iter().for_each(|member| reply::bulk(out, member));
        }
        _ => reply::array(out, 0),
    }
    Ok(())
}

/// A random member's index, by the time stamp counter: a natural divergence.
fn random_index(call: &mut Call<'_>, key: &[u8]) -> Result<Option<usize>, Refusal> {
    let random = call.world.random();
    Ok(call
        .find_set(key)?
        .filter(|set| !set.is_empty())
        .map(|set| (random % set.len() as u64) as usize))
}

fn pop_one(call: &mut Call<'_>, key: &[u8]) -> Result<Option<Bytes>, Refusal> {
    let index = random_index(call, key)?;
    let set = call.find_set(key)?;
    Ok(index.and_then(|index| set.and_then(|set| set.swap_remove_index(index))))
}

pub(super) fn srandmember(call: &mut Call<'_>) -> Outcome {
    let key = call.arg(1);
    let index = random_index(call, key)?;
    let member = call
        .find_set(key)?
        .and_then(|set| set.get_index(index?).cloned());
    match member {
        Some(member) => call.bulk(&member),
        None => call.nil(),
    }
}

pub(super) fn spop(call: &mut Call<'_>) -> Outcome {
    let key = call.arg(1);
    match call.args.len() {
        2 => {
            let Some(member) = pop_one(call, key)? else {
                return call.nil();
            };
            reply::bulk(call.out, &member);
            shrink(call, key, member.len() + MEMBER_COST)
        }
        3 => spop_many(call, key),
        _ => Err(Refusal::Syntax),
    }
}

fn spop_many(call: &mut Call<'_>, key: &[u8]) -> Outcome {
    let count = call
        .integer_arg(2)
        .ok()
        .and_then(|count| usize::try_from(count).ok());
    let count = count.ok_or(Refusal::NotPositive)?;
    let (n, size) = match call.find_set(key)? {
        // The members are not chosen yet: the bound is that of the whole set.
        Some(set) => (
            count.min(set.len()),
            set.iter()
                .map(|member| bulk_size(member.len()))
                .sum::<usize>()
                + 16,
        ),
        None => (0, 16),
    };
    call.admit_reply(size)?;
    reply::array(call.out, n);
    let mut cost = 0;
    for _ in 0..n {
        if let Some(member) = pop_one(call, key)? {
            cost += member.len() + MEMBER_COST;
            reply::bulk(call.out, &member);
        }
    }
    shrink(call, key, cost)
}
