//! The key-value store: keys, their values and expiry times, and the table of commands.
//!
//! Invariants: `used` is at least the heap bytes that keys and values hold; commands that add data
//! are refused once `used` exceeds `max`; an expired key is never seen (it is removed when it is
//! next touched).
//!
//! Does not expire keys in the background: a key that nobody touches stays until memory is short.

mod commands;
mod keys;
mod lists;
mod server;
mod sets;
mod strings;

#[cfg(test)]
mod tests;

pub(crate) use commands::execute;

use crate::hash::BuildHash;
use crate::resp::reply::{self, REPLY_MAX, Refusal};
use crate::resp::scan::{Args, parse_integer};
use crate::world::World;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use indexmap::{IndexMap, IndexSet};

/// Heap bytes of an entry besides key and value; twice the table slot, for the moment when the
/// table grows.
const ENTRY_COST: usize = 224;
/// The same for an element of a list.
const ELEMENT_COST: usize = 64;
/// The same for a member of a set.
const MEMBER_COST: usize = 96;
/// Replies larger than this need room in the common budget.
const FREE_REPLY: usize = 16 * 1024;

type Bytes = Box<[u8]>;

/// A value.
enum Value {
    Text(Vec<u8>),
    List(VecDeque<Bytes>),
    Set(IndexSet<Bytes, BuildHash>),
}

impl Value {
    fn cost(&self) -> usize {
        match self {
            Self::Text(text) => text.capacity(),
            Self::List(list) => list.iter().map(|item| item.len() + ELEMENT_COST).sum(),
            Self::Set(set) => set.iter().map(|item| item.len() + MEMBER_COST).sum(),
        }
    }
}

struct Entry {
    value: Value,
    expires_ms: Option<u64>,
}

/// All keys.
pub(crate) struct Store {
    map: IndexMap<Bytes, Entry, BuildHash>,
    used: usize,
    max: usize,
}

impl Store {
    pub fn new(max: usize) -> Self {
        Self {
            map: IndexMap::default(),
            used: 0,
            max,
        }
    }

    /// The entry of `key`, unless it has expired.
    fn find(&mut self, key: &[u8], now_ms: u64) -> Option<&mut Entry> {
        let index = self.map.get_index_of(key)?;
        let expired = self.map[index]
            .expires_ms
            .is_some_and(|at_ms| at_ms <= now_ms);
        if expired {
            self.remove(key);
            return None;
        }
        Some(&mut self.map[index])
    }

    fn insert(&mut self, key: &[u8], value: Value, expires_ms: Option<u64>) {
        self.used += value.cost();
        match self.map.get_mut(key) {
            Some(entry) => {
                self.used -= entry.value.cost();
                *entry = Entry { value, expires_ms };
            }
            None => {
                self.used += key.len() + ENTRY_COST;
                self.map.insert(key.into(), Entry { value, expires_ms });
            }
        }
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        let Some((key, entry)) = self.map.swap_remove_entry(key) else {
            return false;
        };
        self.used -= key.len() + ENTRY_COST + entry.value.cost();
        true
    }

    /// Notes that a value changed its size.
    fn recost(&mut self, before: usize, after: usize) {
        self.used = self.used + after - before;
    }

    fn clear(&mut self) {
        self.map = IndexMap::default();
        self.used = 0;
    }

    /// True when a command that adds data must be refused. Sweeps expired keys before it says so.
    fn is_full(&mut self, now_ms: u64) -> bool {
        if self.used <= self.max {
            return false;
        }
        let mut freed = 0;
        self.map.retain(|key, entry| {
            let expired = entry.expires_ms.is_some_and(|at_ms| at_ms <= now_ms);
            if expired {
                freed += key.len() + ENTRY_COST + entry.value.cost();
            }
            !expired
        });
        self.used -= freed;
        self.used > self.max
    }
}

/// A command in execution.
struct Call<'a> {
    args: Args<'a>,
    world: &'a mut World,
    out: &'a mut Vec<u8>,
    now_ms: u64,
}

type Outcome = Result<(), Refusal>;

impl<'a> Call<'a> {
    fn arg(&self, i: usize) -> &'a [u8] {
        self.args.get(i)
    }

    fn integer_arg(&self, i: usize) -> Result<i64, Refusal> {
        parse_integer(self.arg(i)).ok_or(Refusal::NotInteger)
    }

    fn find(&mut self, key: &[u8]) -> Option<&mut Entry> {
        self.world.store.find(key, self.now_ms)
    }

    fn find_text(&mut self, key: &[u8]) -> Result<Option<&mut Vec<u8>>, Refusal> {
        match self.find(key).map(|entry| &mut entry.value) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(Refusal::WrongType),
        }
    }

    fn find_list(&mut self, key: &[u8]) -> Result<Option<&mut VecDeque<Bytes>>, Refusal> {
        match self.find(key).map(|entry| &mut entry.value) {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(list)),
            Some(_) => Err(Refusal::WrongType),
        }
    }

    fn find_set(&mut self, key: &[u8]) -> Result<Option<&mut IndexSet<Bytes, BuildHash>>, Refusal> {
        match self.find(key).map(|entry| &mut entry.value) {
            None => Ok(None),
            Some(Value::Set(set)) => Ok(Some(set)),
            Some(_) => Err(Refusal::WrongType),
        }
    }

    fn integer(&mut self, value: i64) -> Outcome {
        reply::integer(self.out, value);
        Ok(())
    }

    fn ok(&mut self) -> Outcome {
        reply::ok(self.out);
        Ok(())
    }

    fn bulk(&mut self, bytes: &[u8]) -> Outcome {
        reply::bulk(self.out, bytes);
        Ok(())
    }

    fn nil(&mut self) -> Outcome {
        reply::nil(self.out);
        Ok(())
    }

    /// Refuses a reply that is too large, or that the common budget has no room for.
    fn admit_reply(&self, size: usize) -> Outcome {
        admit_reply(self.world, size)
    }
}

fn admit_reply(world: &World, size: usize) -> Outcome {
    if size > REPLY_MAX {
        return Err(Refusal::ReplySize);
    }
    if size > FREE_REPLY && !world.can_hold(size) {
        return Err(Refusal::BuffersFull);
    }
    Ok(())
}
