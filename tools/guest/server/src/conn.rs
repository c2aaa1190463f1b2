//! One TCP connection: its socket, the service that speaks on it, and its unsent output.
//!
//! Invariants: the service gets input only when there is room for the reply; room is made by
//! acknowledgements of the client, so what is executed when depends on input frames only.

use crate::demux::FlowKey;
use crate::http::Http;
use crate::outbox::Outbox;
use crate::resp::Resp;
use crate::world::World;
use alloc::vec;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};

/// TCP and UDP echo (RFC 862).
pub(crate) const ECHO_PORT: u16 = 7;
const HTTP_PORTS: [u16; 2] = [80, 8080];
const RESP_PORT: u16 = 6379;

/// What speaks on a connection.
enum Service {
    Echo,
    Http(Http),
    Resp(Resp),
}

impl Service {
    fn on_port(port: u16) -> Option<Self> {
        match port {
            ECHO_PORT => Some(Self::Echo),
            RESP_PORT => Some(Self::Resp(Resp::default())),
            port if HTTP_PORTS.contains(&port) => Some(Self::Http(Http::default())),
            _ => None,
        }
    }

    fn input(&mut self, src: &[u8], outbox: &mut Outbox, world: &mut World) {
        match self {
            Self::Echo => outbox.bytes().extend_from_slice(src),
            Self::Http(http) => http.input(src, outbox, world),
            Self::Resp(resp) => resp.input(src, outbox, world),
        }
    }

    fn is_stalled(&self) -> bool {
        match self {
            Self::Echo => false,
            Self::Http(http) => http.is_stalled(),
            Self::Resp(resp) => resp.is_stalled(),
        }
    }

    fn held(&self) -> usize {
        match self {
            Self::Echo => 0,
            Self::Http(http) => http.held(),
            Self::Resp(resp) => resp.held(),
        }
    }
}

/// True when something listens on the TCP port.
pub(crate) fn is_served(port: u16) -> bool {
    Service::on_port(port).is_some()
}

/// A connection, or a place for one: sockets are used again, with their buffers.
pub(crate) struct Conn {
    /// The stack looks through all sockets of a set for each frame, hence one set for each
    /// connection.
    pub set: SocketSet<'static>,
    handle: SocketHandle,
    service: Service,
    outbox: Outbox,
    /// Heap bytes last reported to the world.
    reported: usize,
    pub key: Option<FlowKey>,
    /// When the last frame came.
    pub heard_us: i64,
    /// When the stack next has something to do for the socket by itself.
    pub wake_us: i64,
    /// Waits for egress.
    pub is_dirty: bool,
}

impl Conn {
    pub fn new(receive_bytes: usize, transmit_bytes: usize) -> Self {
        let receive = SocketBuffer::new(vec![0; receive_bytes]);
        let transmit = SocketBuffer::new(vec![0; transmit_bytes]);
        let mut socket = Socket::new(receive, transmit);
        socket.set_nagle_enabled(false);
        let mut set = SocketSet::new(vec![]);
        let handle = set.add(socket);
        Self {
            set,
            handle,
            service: Service::Echo,
            outbox: Outbox::default(),
            reported: 0,
            key: None,
            heard_us: 0,
            wake_us: i64::MAX,
            is_dirty: false,
        }
    }

    pub fn socket(&mut self) -> &mut Socket<'static> {
        self.set.get_mut(self.handle)
    }

    pub fn state(&self) -> State {
        self.set.get::<Socket<'_>>(self.handle).state()
    }

    /// Bytes that the client has not acknowledged.
    pub fn unacknowledged(&self) -> usize {
        self.set.get::<Socket<'_>>(self.handle).send_queue()
    }

    /// True when the stack has finished with the connection.
    pub fn is_over(&self) -> bool {
        let socket = self.set.get::<Socket<'_>>(self.handle);
        match socket.state() {
            State::Closed => socket.remote_endpoint().is_none(),
            State::Listen => true,
            _ => false,
        }
    }

    /// Gets ready for a client on `port`, which is served.
    pub fn listen(&mut self, port: u16) {
        self.service = Service::on_port(port).unwrap_or(Service::Echo);
        let socket = self.socket();
        socket.abort();
        let listening = socket.listen(port);
        debug_assert!(listening.is_ok(), "a closed socket listens");
    }

    /// Forgets the client.
    pub fn clear(&mut self, world: &mut World) {
        self.socket().abort();
        self.service = Service::Echo;
        self.outbox.reset();
        self.report(world);
        self.key = None;
        self.wake_us = i64::MAX;
    }

    /// Moves output to the socket and input to the service until neither can go on.
    pub fn pump(&mut self, world: &mut World) {
        let Self {
            set,
            handle,
            service,
            outbox,
            ..
        } = self;
        let socket = set.get_mut::<Socket<'_>>(*handle);
        loop {
            while !outbox.is_empty() && socket.can_send() {
                let filled = socket.send(|room| {
                    let n = outbox.fill(room);
                    (n, n)
                });
                debug_assert!(
                    filled.is_ok_and(|n| n > 0),
                    "a socket with room takes bytes"
                );
            }
            if !socket.may_send() && !outbox.is_empty() {
                // The connection is gone: nobody will read the rest.
                outbox.reset();
                outbox.close();
            }
            if !outbox.ready() {
                break;
            }
            if service.is_stalled() {
                service.input(&[], outbox, world);
            } else if socket.can_recv() {
                let taken = socket.recv(|bytes| {
                    service.input(bytes, outbox, world);
                    (bytes.len(), ())
                });
                if taken.is_err() {
                    break;
                }
            } else {
                break;
            }
        }
        self.finish();
        self.report(world);
    }

    /// Closes our half when there is nothing more to say.
    fn finish(&mut self) {
        let idle = self.outbox.is_empty();
        let stalled = self.service.is_stalled();
        let closing = self.outbox.is_closing();
        let socket = self.socket();
        if closing {
            // What the client still sends is of no interest, but must not fill the window.
            while socket.can_recv() && socket.recv(|bytes| (bytes.len(), ())).is_ok() {}
        }
        let client_is_done = socket.state() == State::CloseWait && !socket.can_recv() && !stalled;
        if idle && (closing || client_is_done) {
            socket.close();
        }
    }

    fn report(&mut self, world: &mut World) {
        let held = self.outbox.held() + self.service.held();
        world.buffers_held = world.buffers_held - self.reported + held;
        self.reported = held;
    }
}
