//! Many doubly linked lists over one pool of nodes, all taken at the start.
//!
//! Invariants: a node is in exactly one list; a node number is valid until its value is taken out.
//! A pool that is asked for more than its capacity grows rather than lose what it is given: its
//! user keeps to the limit by back-pressure.

use alloc::vec::Vec;

/// No node.
pub(crate) const NIL: u32 = u32::MAX;

/// The two ends of one list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ends {
    pub(crate) head: u32,
    pub(crate) tail: u32,
}

impl Ends {
    pub(crate) const EMPTY: Self = Self {
        head: NIL,
        tail: NIL,
    };

    pub(crate) const fn is_empty(&self) -> bool {
        self.head == NIL
    }
}

impl Default for Ends {
    fn default() -> Self {
        Self::EMPTY
    }
}

#[derive(Debug)]
struct Node<T> {
    prev: u32,
    next: u32,
    value: Option<T>,
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Lists<T> {
    nodes: Vec<Node<T>>,
    free: u32,
    len: usize,
}

impl<T> Lists<T> {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            nodes: Vec::with_capacity(capacity),
            free: NIL,
            len: 0,
        }
    }

    /// Values in all lists together.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Node numbers are below this.
    pub(crate) fn nodes(&self) -> u32 {
        self.nodes.len() as u32
    }

    #[inline]
    pub(crate) fn get(&self, at: u32) -> Option<&T> {
        self.nodes.get(at as usize)?.value.as_ref()
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        self.nodes.get_mut(at as usize)?.value.as_mut()
    }

    /// The node after this one, or [`NIL`].
    pub(crate) fn next(&self, at: u32) -> u32 {
        self.nodes.get(at as usize).map_or(NIL, |node| node.next)
    }

    /// The node before this one, or [`NIL`].
    pub(crate) fn prev(&self, at: u32) -> u32 {
        self.nodes.get(at as usize).map_or(NIL, |node| node.prev)
    }

    /// The value is written once, where it stays.
    #[inline(always)]
    fn take_node(&mut self, value: T) -> u32 {
        self.len += 1;
        let at = self.free;
        if let Some(node) = self.nodes.get_mut(at as usize) {
            self.free = node.next;
            node.value = Some(value);
            return at;
        }
        self.nodes.push(Node {
            prev: NIL,
            next: NIL,
            value: Some(value),
        });
        (self.nodes.len() - 1) as u32
    }

    #[inline(always)]
    pub(crate) fn push_back(&mut self, ends: &mut Ends, value: T) -> u32 {
        self.insert_after(ends, ends.tail, value)
    }

    /// Puts the value behind node `prev` of this list; in front when that is [`NIL`].
    #[inline(always)]
    pub(crate) fn insert_after(&mut self, ends: &mut Ends, prev: u32, value: T) -> u32 {
        let at = self.take_node(value);
        self.link(ends, prev, at);
        at
    }

    #[inline(always)]
    fn link(&mut self, ends: &mut Ends, prev: u32, at: u32) {
        // Which of the two is a choice of address, no branch: nobody can foretell it.
        let before = match self.nodes.get_mut(prev as usize) {
            Some(node) => &mut node.next,
            None => &mut ends.head,
        };
        let next = core::mem::replace(before, at);
        let behind = match self.nodes.get_mut(next as usize) {
            Some(node) => &mut node.prev,
            None => &mut ends.tail,
        };
        *behind = at;
        let node = &mut self.nodes[at as usize];
        (node.prev, node.next) = (prev, next);
    }

    #[inline(always)]
    fn unlink(&mut self, ends: &mut Ends, at: u32) {
        let Node { prev, next, .. } = self.nodes[at as usize];
        self.join(ends, prev, next);
    }

    /// Makes two nodes neighbours.
    #[inline(always)]
    fn join(&mut self, ends: &mut Ends, prev: u32, next: u32) {
        match self.nodes.get_mut(prev as usize) {
            Some(node) => node.next = next,
            None => ends.head = next,
        }
        let behind = match self.nodes.get_mut(next as usize) {
            Some(node) => &mut node.prev,
            None => &mut ends.tail,
        };
        *behind = prev;
    }

    /// Forgets a node and its value, which its user has emptied.
    #[inline(always)]
    pub(crate) fn discard(&mut self, ends: &mut Ends, at: u32) {
        let Some(node) = self.nodes.get_mut(at as usize) else {
            return;
        };
        if node.value.take().is_none() {
            return;
        }
        let (prev, next) = (node.prev, core::mem::replace(&mut node.next, self.free));
        (self.free, self.len) = (at, self.len - 1);
        self.join(ends, prev, next);
    }

    /// Takes a node out of its list.
    pub(crate) fn remove(&mut self, ends: &mut Ends, at: u32) -> Option<T> {
        let value = self.nodes.get_mut(at as usize)?.value.take()?;
        self.unlink(ends, at);
        self.give_back(at);
        Some(value)
    }

    pub(crate) fn pop_front(&mut self, ends: &mut Ends) -> Option<T> {
        self.remove(ends, ends.head)
    }

    /// Takes a value out without a look at its list, which is forgotten as a whole.
    pub(crate) fn take(&mut self, at: u32) -> Option<T> {
        let value = self.nodes.get_mut(at as usize)?.value.take()?;
        self.give_back(at);
        Some(value)
    }

    /// Forgets all values and lists; the memory stays.
    pub(crate) fn clear(&mut self) {
        self.nodes.clear();
        (self.free, self.len) = (NIL, 0);
    }

    #[inline]
    fn give_back(&mut self, at: u32) {
        self.len -= 1;
        self.nodes[at as usize].next = self.free;
        self.free = at;
    }

    /// The nodes of a list, front to back.
    pub(crate) fn iter(&self, ends: &Ends) -> impl Iterator<Item = (u32, &T)> {
        let mut at = ends.head;
        core::iter::from_fn(move || {
            let node = self.nodes.get(at as usize)?;
            let here = core::mem::replace(&mut at, node.next);
            Some((here, node.value.as_ref()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::VecDeque;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lists_are_lists(operations in proptest::collection::vec((0u8..4, 0usize..2, 0usize..8), 1..200)) {
            let mut pool = Lists::with_capacity(4);
            let mut ends = [Ends::EMPTY; 2];
            let mut model: [VecDeque<usize>; 2] = Default::default();
            for (n, (operation, list, place)) in operations.into_iter().enumerate() {
                let nodes: Vec<_> = pool.iter(&ends[list]).map(|(at, _)| at).collect();
                match operation {
                    0 => {
                        pool.push_back(&mut ends[list], n);
                        model[list].push_back(n);
                    }
                    1 => prop_assert_eq!(pool.pop_front(&mut ends[list]), model[list].pop_front()),
                    2 => {
                        let place = place.min(nodes.len());
                        let prev = if place == 0 { NIL } else { nodes[place - 1] };
                        pool.insert_after(&mut ends[list], prev, n);
                        model[list].insert(place, n);
                    }
                    3 if place < nodes.len() => {
                        prop_assert_eq!(pool.remove(&mut ends[list], nodes[place]), model[list].remove(place));
                    }
                    _ => {}
                }
                for list in 0..2 {
                    prop_assert!(pool.iter(&ends[list]).map(|(_, v)| v).eq(&model[list]));
                    let mut back = Vec::new();
                    let mut at = ends[list].tail;
                    while at != NIL {
                        back.push(*pool.get(at).unwrap());
                        at = pool.prev(at);
                    }
                    prop_assert!(back.iter().rev().eq(&model[list]));
                }
                prop_assert_eq!(pool.len(), model[0].len() + model[1].len());
            }
            pool.clear();
            prop_assert_eq!((pool.len(), pool.nodes()), (0, 0));
            let mut again = Ends::EMPTY;
            pool.push_back(&mut again, 7);
            prop_assert_eq!(pool.pop_front(&mut again), Some(7));
        }
    }
}
