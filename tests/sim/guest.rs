//! The model guest: a server on real Ethernet frames with the divergences of a real one: random initial sequence
//! numbers, random segmentation, random scheduling, answers made of random numbers and of the time.
//!
//! Invariants: it remembers what it answered (tokens, counters, values), so that a replica that took over from a
//! wrong state contradicts itself; its whole state can be cloned and hashed at any instant. What it remembers lies
//! in pages, and every write marks its page as dirty; the rest (rings, counters of the device) is its machine state.
//! Randomness comes from the host it runs on, not from its state.
//!
//! Requests are lines; see [`Guest::answer`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use colo_compare::testing::{Side, echo, udp};
use colo_compare::{Direction, Protocol, wire};

use crate::prng::Prng;
use crate::tcp::{End, Seg, State, reset};

/// Descriptors of the guest_rx ring.
pub const RING: usize = 64;
/// The server's port, TCP and UDP.
pub const PORT: u16 = 7;
/// Closed connections are remembered for so long.
const TIME_WAIT_US: u64 = 3_000_000;

type Key = (bool, u16, u16);

#[derive(Debug, Clone, Hash)]
struct Conn {
    end: End,
    finished_us: Option<u64>,
    /// It waits for the answer on a connection that the guest opened.
    waits: bool,
    /// The guest opened it, on behalf of that one.
    opened_for: Option<Key>,
}

impl Conn {
    fn new(end: End) -> Self {
        Self {
            end,
            finished_us: None,
            waits: false,
            opened_for: None,
        }
    }
}

/// Pages of the guest's memory, one bit each in a dirty set.
pub const PAGES: usize = 64;
/// Those where its connections lie; the others are the applications'.
const CONN_PAGES: usize = 16;
/// What all requests share.
const SHARED_PAGE: usize = CONN_PAGES;

/// A page of memory.
#[derive(Debug, Clone, Hash, Default)]
pub struct Page {
    conns: BTreeMap<Key, Conn>,
    counters: BTreeMap<u64, u64>,
    values: BTreeMap<u64, u64>,
    tokens: BTreeSet<u64>,
    shared: u64,
    opened: u64,
}

impl Page {
    /// Of its contents.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// What is not in memory: it travels in every checkpoint.
#[derive(Debug, Clone, Hash, Default)]
pub struct MachineState {
    ring: VecDeque<Vec<u8>>,
    /// The guest_tx ring: what the device has not taken yet.
    pub sent: VecDeque<Vec<u8>>,
    /// Frames of the ring processed since the start.
    pub consumed: u64,
}

/// The guest.
#[derive(Debug, Clone)]
pub struct Guest {
    pages: Vec<Rc<Page>>,
    /// Pages written since somebody last took this set.
    pub dirty: u64,
    pub state: MachineState,
}

/// Pages by number.
pub type PageSet = Vec<(usize, Rc<Page>)>;

fn conn_page(key: &Key) -> usize {
    (usize::from(key.1) * 5 + usize::from(key.2) * 3 + usize::from(key.0)) % CONN_PAGES
}

fn app_page(key: u64) -> usize {
    SHARED_PAGE + (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % (PAGES - SHARED_PAGE)
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            pages: vec![Rc::default(); PAGES],
            dirty: 0,
            state: MachineState::default(),
        }
    }
}

/// The bytes of an answer of length `n` to `key`.
pub fn body(key: u64, n: usize) -> Vec<u8> {
    (0..n as u64)
        .map(|i| (key.wrapping_mul(31).wrapping_add(i * 7) >> (i % 5)) as u8)
        .collect()
}

/// A short checksum of uploads.
pub fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0193) & 0xffff_ffff
    })
}

impl Guest {
    /// Puts a frame into the guest_rx ring; false when it is full.
    pub fn deliver(&mut self, frame: Vec<u8>) -> bool {
        let room = self.has_room();
        if room {
            self.state.ring.push_back(frame);
        }
        room
    }

    /// Whether the ring has room.
    pub fn has_room(&self) -> bool {
        self.state.ring.len() < RING
    }

    /// A digest of the whole state.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.pages.hash(&mut hasher);
        self.state.hash(&mut hasher);
        hasher.finish()
    }

    /// The pages of a set as they are now.
    pub fn pages(&self, set: u64) -> PageSet {
        let numbers = (0..PAGES).filter(|n| set & (1 << n) != 0);
        numbers.map(|n| (n, self.pages[n].clone())).collect()
    }

    /// Replaces pages by those of a checkpoint or of a synchronisation.
    pub fn write_pages(&mut self, pages: &PageSet) {
        for (n, page) in pages {
            self.pages[*n] = page.clone();
        }
    }

    /// For reading.
    fn page(&self, n: usize) -> &Page {
        &self.pages[n]
    }

    /// For writing.
    fn page_mut(&mut self, n: usize) -> &mut Page {
        self.dirty |= 1 << n;
        Rc::make_mut(&mut self.pages[n])
    }

    fn conns(&self) -> impl Iterator<Item = (&Key, &Conn)> {
        self.pages[..CONN_PAGES].iter().flat_map(|p| &p.conns)
    }

    fn conn_mut(&mut self, key: &Key) -> Option<&mut Conn> {
        let n = conn_page(key);
        self.page(n).conns.contains_key(key).then_some(())?;
        self.page_mut(n).conns.get_mut(key)
    }

    fn insert(&mut self, key: Key, conn: Conn) {
        self.page_mut(conn_page(&key)).conns.insert(key, conn);
    }

    /// Whether there is something to do at once.
    pub fn is_busy(&self) -> bool {
        !self.state.ring.is_empty()
    }

    /// When it wants to run without input.
    pub fn deadline(&self) -> Option<u64> {
        self.conns().filter_map(|(_, c)| c.end.deadline()).min()
    }

    /// An impossible thing that one of its connections saw.
    pub fn complaint(&self) -> Option<&String> {
        self.conns().find_map(|(_, c)| c.end.complaint.as_ref())
    }

    /// Takes the applications' memory from a checkpoint but keeps its own connections: what half of it would make
    /// of the guest (for the mutation that applies pages as they come).
    pub fn mix(&mut self, pages: &PageSet) {
        let of_apps = pages.iter().filter(|(n, _)| *n >= CONN_PAGES);
        self.write_pages(&of_apps.cloned().collect());
    }

    /// Runs for a while: takes some frames from the ring, answers, sends. A full guest_tx ring makes it wait.
    pub fn wake(&mut self, now: u64, chance: &mut Prng) {
        if self.state.sent.len() >= RING {
            return;
        }
        let mut out = Vec::new();
        self.run(now, chance, &mut out);
        self.state.sent.extend(out);
    }

    fn run(&mut self, now: u64, chance: &mut Prng, out: &mut Vec<Vec<u8>>) {
        let most = if chance.chance(700) {
            RING as u64
        } else {
            1 + chance.below(4)
        };
        for _ in 0..most {
            let Some(frame) = self.state.ring.pop_front() else {
                break;
            };
            self.state.consumed += 1;
            self.receive(now, &frame, chance, out);
        }
        let mut keys: Vec<Key> = self.conns().map(|(key, _)| *key).collect();
        if !keys.is_empty() && chance.chance(300) {
            let by = chance.below(keys.len() as u64) as usize;
            keys.rotate_left(by);
        }
        for key in keys {
            self.serve(now, key, chance, out);
        }
        let is_over = |c: &Conn| {
            let forgotten = c.finished_us.is_some_and(|at| at + TIME_WAIT_US <= now);
            forgotten || c.end.state == State::Reset
        };
        let over: Vec<Key> = self
            .conns()
            .filter_map(|(key, c)| is_over(c).then_some(*key))
            .collect();
        for key in over {
            self.page_mut(conn_page(&key)).conns.remove(&key);
        }
    }

    fn receive(&mut self, now: u64, frame: &[u8], chance: &mut Prng, out: &mut Vec<Vec<u8>>) {
        let packet = wire::parse(frame, frame.len(), Direction::ToGuest);
        let v6 = packet.network == wire::Network::V6;
        let side = if v6 { Side::V6 } else { Side::V4 };
        let l4 = usize::from(packet.l4);
        match packet.key.protocol() {
            Protocol::Tcp => self.receive_tcp(now, frame, v6, chance, out),
            Protocol::Udp if packet.key.guest_port() == PORT => {
                let text = String::from_utf8_lossy(&frame[l4 + 8..usize::from(packet.end)]);
                let answer = self.answer_datagram(now, &text, chance);
                out.push(udp(
                    side,
                    false,
                    PORT,
                    packet.key.peer_port(),
                    answer.as_bytes(),
                ));
            }
            Protocol::Icmp | Protocol::Icmpv6 if matches!(frame[l4], 8 | 128) => {
                let payload = &frame[l4 + 8..usize::from(packet.end)];
                out.push(echo(side, false, packet.key.peer_port(), payload));
            }
            _ => {}
        }
    }

    fn receive_tcp(
        &mut self,
        now: u64,
        frame: &[u8],
        v6: bool,
        chance: &mut Prng,
        out: &mut Vec<Vec<u8>>,
    ) {
        let Some(mut seg) = Seg::read(frame, Direction::ToGuest) else {
            return;
        };
        // What its window or its memory has no room for is lost, also a part of a segment.
        let is_cut = !seg.payload.is_empty() && chance.chance(20);
        if is_cut {
            seg.cut(chance.below(seg.payload.len() as u64) as usize);
        }
        let key = (v6, seg.guest_port, seg.peer_port);
        let is_syn = seg.header.has(wire::tcp::SYN) && !seg.header.has(wire::tcp::ACK);
        match self.conn_mut(&key) {
            // The port pair is used again (RFC 6191).
            Some(conn) if is_syn && conn.finished_us.is_some() => {
                *conn = Conn::new(End::accept(true, &seg, chance));
            }
            Some(conn) => {
                conn.end.handle(now, &seg);
                if is_cut && conn.end.state == State::Open {
                    conn.end.tell();
                }
            }
            None if is_syn && seg.guest_port == PORT => {
                let conn = Conn::new(End::accept(true, &seg, chance));
                self.insert(key, conn);
            }
            None => out.extend(reset(&seg)),
        }
    }

    fn serve(&mut self, now: u64, key: Key, chance: &mut Prng, out: &mut Vec<Vec<u8>>) {
        // Taken out, so that the application may use the rest of the state.
        let Some(mut conn) = self.page_mut(conn_page(&key)).conns.remove(&key) else {
            return;
        };
        match conn.opened_for {
            Some(asker) => self.hear(&mut conn, asker),
            None => self.answer_all(now, key, &mut conn, chance),
        }
        if conn.end.peer_closed && !conn.end.is_closing() {
            conn.end.close();
        }
        conn.end.poll(now, chance, out);
        if conn.end.is_finished() {
            conn.finished_us.get_or_insert(now);
        }
        self.insert(key, conn);
    }

    fn answer_all(&mut self, now: u64, key: Key, conn: &mut Conn, chance: &mut Prng) {
        while !conn.waits
            && let Some((request, len)) = take_request(&conn.end.inbox)
        {
            conn.end.inbox.drain(..len);
            if request.verb == b'O' {
                conn.waits = true;
                self.open(key, &request, chance);
                continue;
            }
            let answer = self.answer(now, &request, chance);
            conn.end.send(&answer);
        }
    }

    /// `O port fixed`: opens a connection to that port of the client, tells a token there, and answers with it
    /// when it was acknowledged. The own port is a random one, or the next.
    fn open(&mut self, asker: Key, request: &Request, chance: &mut Prng) {
        let page = self.page_mut(SHARED_PAGE);
        page.opened += 1;
        let opened = page.opened;
        let own = match request.args.get(1) {
            Some(1) => 20_000 + opened as u16,
            _ => 30_000 + chance.below(10_000) as u16,
        };
        let ports = (own, request.args.first().copied().unwrap_or(0) as u16);
        let side = if asker.0 { Side::V6 } else { Side::V4 };
        let mut conn = Conn::new(End::connect(true, side, ports, true, chance));
        conn.opened_for = Some(asker);
        let token = if own < 30_000 { opened } else { chance.next() };
        conn.end.send(format!("{token}\n").as_bytes());
        self.insert((asker.0, ports.0, ports.1), conn);
    }

    /// The other end of a connection that the guest opened repeats the token.
    fn hear(&mut self, conn: &mut Conn, asker: Key) {
        if conn.end.is_closing() || !conn.end.inbox.contains(&b'\n') {
            return;
        }
        let token = String::from_utf8_lossy(&conn.end.inbox).into_owned();
        conn.end.close();
        if let Some(asker) = self.conn_mut(&asker) {
            asker.waits = false;
            asker.end.send(format!("O {token}").as_bytes());
        }
    }

    /// `E n key`: n bytes; `P n` and n bytes: their sum; `C key`: next of a counter; `X`: next of the one that all
    /// share; `S key value`, `G key`: store, fetch; `T`: a fresh token; `V token`: 1 if it was given out; `N`: time.
    fn answer(&mut self, now: u64, request: &Request, chance: &mut Prng) -> Vec<u8> {
        let arg = |n: usize| request.args.get(n).copied().unwrap_or(0);
        let number = match request.verb {
            b'E' => {
                let mut bytes = format!("E {}\n", arg(0)).into_bytes();
                bytes.extend(body(arg(1), arg(0) as usize));
                return bytes;
            }
            b'P' => sum(&request.payload),
            b'C' => {
                let page = self.page_mut(app_page(arg(0)));
                let counter = page.counters.entry(arg(0)).or_default();
                *counter += 1;
                *counter
            }
            b'X' => {
                let page = self.page_mut(SHARED_PAGE);
                page.shared += 1;
                page.shared
            }
            b'S' => {
                let page = self.page_mut(app_page(!arg(0)));
                page.values.insert(arg(0), arg(1));
                1
            }
            b'G' => {
                let page = self.page(app_page(!arg(0)));
                page.values.get(&arg(0)).copied().unwrap_or(0)
            }
            b'T' => {
                let token = chance.next();
                self.page_mut(app_page(token)).tokens.insert(token);
                token
            }
            b'V' => u64::from(self.page(app_page(arg(0))).tokens.contains(&arg(0))),
            b'N' => now,
            _ => 0,
        };
        format!("{} {number}\n", char::from(request.verb)).into_bytes()
    }

    /// The same with an identifier in front: `id VERB args`.
    fn answer_datagram(&mut self, now: u64, text: &str, chance: &mut Prng) -> String {
        let (id, rest) = text.split_once(' ').unwrap_or((text, ""));
        let line = format!("{rest}\n");
        match take_request(line.as_bytes()) {
            Some((request, _)) if request.verb != b'E' && request.verb != b'P' => {
                let answer = self.answer(now, &request, chance);
                format!("{id} {}", String::from_utf8_lossy(&answer).trim_end())
            }
            _ => format!("{id} ?"),
        }
    }
}

struct Request {
    verb: u8,
    args: Vec<u64>,
    payload: Vec<u8>,
}

/// The first whole request in `bytes`, and its length.
fn take_request(bytes: &[u8]) -> Option<(Request, usize)> {
    let line_len = bytes.iter().position(|b| *b == b'\n')? + 1;
    let line = std::str::from_utf8(&bytes[..line_len - 1]).ok()?;
    let mut words = line.split(' ');
    let verb = words.next()?.bytes().next()?;
    let args: Vec<u64> = words.filter_map(|w| w.parse().ok()).collect();
    let payload_len = if verb == b'P' {
        *args.first()? as usize
    } else {
        0
    };
    let payload = bytes.get(line_len..line_len + payload_len)?.to_vec();
    Some((
        Request {
            verb,
            args,
            payload,
        },
        line_len + payload_len,
    ))
}
