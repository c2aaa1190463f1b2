//! Frames in the order of their times: captures of several queues or interfaces are slightly out of
//! order.
//!
//! Invariants: times never go back; at most [`SORT_WINDOW`] records wait. A frame that comes later
//! than the window allows keeps its place, takes the time of the frame before it, and is counted.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{Fault, Reader, Record};

/// How many records are looked at ahead.
pub const SORT_WINDOW: usize = 4096;

/// See the module.
#[derive(Debug)]
pub struct Sorted<'a> {
    reader: Reader<'a>,
    /// Earliest first; equal times in the order of the file.
    waiting: BinaryHeap<Reverse<Waiting<'a>>>,
    last_ns: u64,
    late: u64,
}

#[derive(Debug)]
struct Waiting<'a>(Record<'a>);

impl Waiting<'_> {
    fn key(&self) -> (u64, u64) {
        (self.0.at_ns, self.0.number)
    }
}

impl PartialEq for Waiting<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Waiting<'_> {}

impl PartialOrd for Waiting<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl<'a> Sorted<'a> {
    /// Sorts what a reader gives.
    pub fn new(reader: Reader<'a>) -> Self {
        Self {
            reader,
            waiting: BinaryHeap::with_capacity(SORT_WINDOW),
            last_ns: 0,
            late: 0,
        }
    }

    /// Frames that were out of order by more than the window.
    pub fn late(&self) -> u64 {
        self.late
    }

    /// The next frame; `None` after the last one. A fault anywhere in the window comes first.
    pub fn next_record(&mut self) -> Result<Option<Record<'a>>, Fault> {
        while self.waiting.len() < SORT_WINDOW {
            let Some(record) = self.reader.next().transpose()? else {
                break;
            };
            self.waiting.push(Reverse(Waiting(record)));
        }
        let Some(Reverse(Waiting(mut record))) = self.waiting.pop() else {
            return Ok(None);
        };
        if record.at_ns < self.last_ns {
            self.late += 1;
            record.at_ns = self.last_ns;
        }
        self.last_ns = record.at_ns;
        Ok(Some(record))
    }
}
