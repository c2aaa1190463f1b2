//! The notify socket: asks for checkpoints and hears that one was taken.
//!
//! The protocol of QEMU's `notify_dev`: messages with a 4-byte big-endian length. Out:
//! `DO_CHECKPOINT`, and `COLO_COMPARE_GET_XEN_INIT` in answer to a greeting. In:
//! `COLO_USERSPACE_PROXY_INIT`, the greeting, and `COLO_CHECKPOINT`: both guests are at the same
//! state now, whether a checkpoint was asked for or not. With `vnet_hdr` the messages that come in
//! have the 4 bytes for the length of a virtio-net header after the first length, as they have in
//! QEMU; those that go out do not.
//!
//! Invariant: what is not understood is reported and changes nothing.

use std::io::{self, Read, Write};

use crate::address::Socket;
use crate::error::SocketsError;

const DO_CHECKPOINT: &[u8] = b"DO_CHECKPOINT";
const CHECKPOINT_DONE: &[u8] = b"COLO_CHECKPOINT";
const GREETING: &[u8] = b"COLO_USERSPACE_PROXY_INIT";
const GREETING_ANSWER: &[u8] = b"COLO_COMPARE_GET_XEN_INIT";

/// Longest message that is taken.
const MESSAGE_MAX: usize = 1024;
/// Most bytes that wait for a peer that does not read.
const UNSENT_MAX: usize = 64 << 10;

/// The socket and what is under way on it.
#[derive(Debug)]
pub(crate) struct Notify {
    socket: Socket,
    vnet_hdr: bool,
    received: Vec<u8>,
    position: u64,
    unsent: Vec<u8>,
    gone: bool,
}

impl Notify {
    pub(crate) fn new(socket: Socket, vnet_hdr: bool) -> Self {
        Self {
            socket,
            vnet_hdr,
            received: Vec::with_capacity(2 * MESSAGE_MAX),
            position: 0,
            unsent: Vec::with_capacity(UNSENT_MAX),
            gone: false,
        }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether the other end was closed.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone
    }

    pub(crate) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub(crate) fn request_checkpoint(&mut self) {
        self.send(DO_CHECKPOINT);
    }

    fn send(&mut self, message: &[u8]) {
        if self.unsent.len() + 4 + message.len() > UNSENT_MAX {
            // As many requests wait already, and one is as good as all of them.
            return;
        }
        self.unsent
            .extend_from_slice(&(message.len() as u32).to_be_bytes());
        self.unsent.extend_from_slice(message);
        self.flush();
    }

    /// Sends what the socket takes.
    pub(crate) fn flush(&mut self) {
        while !self.unsent.is_empty() && !self.gone {
            match (&self.socket.file).write(&self.unsent) {
                Ok(n) => {
                    self.unsent.drain(..n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.gone = true,
            }
        }
    }

    /// Reads what there is. Gives whether a checkpoint was taken.
    pub(crate) fn receive(&mut self) -> Result<bool, SocketsError> {
        let mut done = false;
        let mut chunk = [0; MESSAGE_MAX];
        while !self.gone {
            match (&self.socket.file).read(&mut chunk) {
                Ok(0) => self.gone = true,
                Ok(n) => {
                    self.received.extend_from_slice(&chunk[..n]);
                    done |= self.take_messages()?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.gone = true,
            }
        }
        Ok(done)
    }

    fn take_messages(&mut self) -> Result<bool, SocketsError> {
        let mut done = false;
        while let Some(length) = self.received.first_chunk::<4>() {
            let found = u32::from_be_bytes(*length);
            let lead = if self.vnet_hdr { 8 } else { 4 };
            let end = lead + found as usize;
            if found == 0 || found as usize > MESSAGE_MAX {
                return Err(SocketsError::Length {
                    socket: self.socket.name.clone(),
                    at: self.position,
                    found,
                    most: MESSAGE_MAX as u32,
                });
            }
            if self.received.len() < end {
                break;
            }
            let message = &self.received[lead..end];
            let is_greeting = message == GREETING;
            if message == CHECKPOINT_DONE {
                done = true;
            } else if !is_greeting {
                tracing::warn!(
                    "{}: message {:?} at byte {} is not known; it is ignored",
                    self.socket.name,
                    String::from_utf8_lossy(message),
                    self.position
                );
            }
            if is_greeting {
                self.send(GREETING_ANSWER);
            }
            self.received.drain(..end);
            self.position += end as u64;
        }
        Ok(done)
    }
}
