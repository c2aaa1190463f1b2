//! HTTP/1.1 keep-alive against the demo guest's pages, counter, clock and sessions.
//!
//! Invariants: one request outstanding; page bodies are compared as they arrive and not kept.
//!
//! Does not pipeline, and knows no chunked bodies: the demo guest sends `Content-Length`.

use super::conversation::{Broken, Conversation, Kind};
use super::facts::{Facts, Session};
use super::random::Random;

const HEAD_MAX: usize = 8 << 10;
const SMALL_BODY_MAX: usize = 64 << 10;
/// Sessions checked by one connection in one audit.
const AUDIT_SESSIONS: usize = 256;
/// Page sizes: empty, within a segment, around a segment, many segments.
const SIZES: [u64; 8] = [0, 1, 100, 1000, 1448, 1500, 10_000, 65_536];

#[derive(Debug, Clone, Copy)]
enum Expect {
    Page { length: usize },
    Counter { floor: u64 },
    CounterRead { floor: u64 },
    Login,
    Session { index: usize },
    NoSession,
    Time { floor_us: u64 },
    Random,
}

/// The head of a response, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    status: u16,
    length: usize,
}

/// One HTTP connection.
#[derive(Debug)]
pub(crate) struct Http {
    number: u64,
    random: Random,
    expect: Option<Expect>,
    head: Option<Head>,
    buffer: Vec<u8>,
    page_at: usize,
    page_wrong: bool,
    visit: Option<u64>,
    visit_left: u64,
    audit_left: usize,
    audit_counter: bool,
}

impl Http {
    /// A connection that stays, or one that is closed and opened again after `visit` requests.
    pub(crate) fn new(number: u64, seed: u64, visit: Option<u64>) -> Self {
        Self {
            number,
            random: Random::new(seed),
            expect: None,
            head: None,
            buffer: Vec::new(),
            page_at: 0,
            page_wrong: false,
            visit,
            visit_left: visit.unwrap_or(0),
            audit_left: 0,
            audit_counter: false,
        }
    }

    fn choose(&mut self, facts: &Facts) -> Expect {
        let sessions = facts.sessions.len() as u64;
        match self
            .random
            .below(if facts.deterministic { 70 } else { 100 })
        {
            0 => Expect::Page {
                length: super::PAGE_MAX,
            },
            1..60 => {
                let size = SIZES[self.random.below(SIZES.len() as u64) as usize];
                Expect::Page {
                    length: size as usize,
                }
            }
            60..70 => Expect::NoSession,
            70..80 => Expect::Counter {
                floor: facts.posts.floor(),
            },
            80..83 if facts.wants_sessions() => Expect::Login,
            80..92 if sessions > 0 => Expect::Session {
                index: self.random.below(sessions) as usize,
            },
            92..96 => Expect::Time {
                floor_us: facts.clock_us,
            },
            _ => Expect::Random,
        }
    }

    fn write(&mut self, facts: &Facts, expect: Expect, out: &mut Vec<u8>) {
        let (method, path) = match expect {
            Expect::Page { length } => ("GET", format!("/bytes/{length}")),
            Expect::Counter { .. } => ("POST", "/counter".to_owned()),
            Expect::CounterRead { .. } => ("GET", "/counter".to_owned()),
            Expect::Login => ("POST", "/login".to_owned()),
            Expect::Session { index } => {
                ("GET", format!("/session/{}", facts.sessions[index].token))
            }
            Expect::NoSession => (
                "GET",
                format!(
                    "/session/none-{}-{}",
                    self.number,
                    self.random.below(1 << 40)
                ),
            ),
            Expect::Time { .. } => ("GET", "/time".to_owned()),
            Expect::Random => ("GET", "/random".to_owned()),
        };
        let length = if method == "POST" {
            "Content-Length: 0\r\n"
        } else {
            ""
        };
        out.extend(format!("{method} {path} HTTP/1.1\r\nHost: guest\r\n{length}\r\n").as_bytes());
        self.expect = Some(expect);
        self.head = None;
        self.page_at = 0;
        self.page_wrong = false;
    }

    /// Takes the head off `bytes`. Gives what is left of them, `None` while the head is incomplete.
    fn hear_head<'a>(&mut self, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, Broken> {
        let before = self.buffer.len();
        let take = bytes.len().min(HEAD_MAX - before.min(HEAD_MAX));
        self.buffer.extend(&bytes[..take]);
        let from = before.saturating_sub(3);
        let end = self.buffer[from..]
            .windows(4)
            .position(|window| window == b"\r\n\r\n");
        let Some(end) = end.map(|at| from + at + 4) else {
            if self.buffer.len() >= HEAD_MAX {
                return Err(self.broken("endless response head"));
            }
            return Ok(None);
        };
        let Some(head) = parse_head(&self.buffer[..end]) else {
            let text = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
            return Err(self.broken(&format!("response head {text:?}")));
        };
        if !matches!(self.expect, Some(Expect::Page { .. })) && head.length > SMALL_BODY_MAX {
            return Err(self.broken(&format!("unexpected body of {} bytes", head.length)));
        }
        self.head = Some(head);
        self.buffer.clear();
        Ok(Some(&bytes[end - before..]))
    }

    fn hear_page(&mut self, facts: &Facts, bytes: &[u8]) {
        let want = facts.page.get(self.page_at..self.page_at + bytes.len());
        self.page_wrong |= want != Some(bytes);
        self.page_at += bytes.len();
    }

    fn judge(&mut self, facts: &mut Facts, expect: Expect, head: Head) -> Result<(), String> {
        let body = String::from_utf8_lossy(&self.buffer).trim().to_owned();
        let want = if matches!(expect, Expect::NoSession) {
            404
        } else {
            200
        };
        if head.status != want {
            return Err(format!("{expect:?}: status {}, not {want}", head.status));
        }
        let number = || {
            body.parse::<u64>()
                .map_err(|_| format!("{expect:?}: body {body:?}"))
        };
        match expect {
            Expect::Page { length } if self.page_wrong || head.length != length => Err(format!(
                "/bytes/{length}: wrong content or length ({})",
                head.length
            )),
            Expect::Page { .. } | Expect::NoSession => Ok(()),
            Expect::Session { index } => facts.sessions[index].asked(body),
            Expect::Counter { floor } => facts.posts.raised(floor, number()?),
            Expect::CounterRead { floor } => facts.posts.read(floor, number()?),
            Expect::Login if body.is_empty() || known(facts, &body) => {
                Err(format!("session token {body:?} is empty or came twice"))
            }
            Expect::Login => {
                facts.sessions.push(Session {
                    token: body,
                    told: None,
                });
                Ok(())
            }
            Expect::Time { floor_us } => facts.time_told(floor_us, number()?),
            Expect::Random => facts.random_seen(body),
        }
    }

    fn broken(&self, what: &str) -> Broken {
        Broken(format!("http {}: {what} to {:?}", self.number, self.expect))
    }
}

impl Conversation for Http {
    fn kind(&self) -> Kind {
        Kind::Http
    }

    fn ask(&mut self, facts: &mut Facts, out: &mut Vec<u8>) -> usize {
        let expect = self.choose(facts);
        self.visit_left = self.visit_left.saturating_sub(1);
        self.write(facts, expect, out);
        1
    }

    fn begin_audit(&mut self) {
        self.audit_left = AUDIT_SESSIONS;
        self.audit_counter = true;
    }

    fn audit(&mut self, facts: &mut Facts, out: &mut Vec<u8>) -> usize {
        let sessions = facts.sessions.len();
        if self.audit_left > 0 && sessions > 0 {
            self.audit_left -= 1;
            // Connections begin at different places, so that together they see all.
            let index = (self.number as usize * 61 + self.audit_left) % sessions;
            self.write(facts, Expect::Session { index }, out);
            return 1;
        }
        if std::mem::take(&mut self.audit_counter) && !facts.deterministic {
            let floor = facts.posts.floor();
            self.write(facts, Expect::CounterRead { floor }, out);
            return 1;
        }
        0
    }

    fn hear(&mut self, facts: &mut Facts, bytes: &[u8]) -> Result<usize, Broken> {
        let Some(expect) = self.expect else {
            return Err(self.broken("bytes that answer nothing"));
        };
        let mut bytes = bytes;
        if self.head.is_none() {
            match self.hear_head(bytes)? {
                Some(rest) => bytes = rest,
                None => return Ok(0),
            }
        }
        let Some(head) = self.head else { return Ok(0) };
        let is_page = matches!(expect, Expect::Page { .. });
        let so_far = if is_page {
            self.page_at
        } else {
            self.buffer.len()
        };
        if so_far + bytes.len() > head.length {
            return Err(self.broken("more bytes than its length says"));
        }
        if is_page {
            self.hear_page(facts, bytes);
        } else {
            self.buffer.extend(bytes);
        }
        if so_far + bytes.len() < head.length {
            return Ok(0);
        }
        let verdict = self.judge(facts, expect, head);
        facts.judge(verdict.map_err(|what| format!("http {}: {what}", self.number)));
        self.buffer.clear();
        self.expect = None;
        self.head = None;
        Ok(1)
    }

    fn hang_up(&mut self, facts: &mut Facts) {
        if let Some(Expect::Counter { .. }) = self.expect.take() {
            facts.posts.lost();
        }
        self.head = None;
        self.buffer.clear();
        self.visit_left = self.visit.unwrap_or(0);
    }

    fn leaving(&mut self) -> bool {
        self.visit.is_some() && self.visit_left == 0 && self.expect.is_none()
    }
}

fn known(facts: &Facts, token: &str) -> bool {
    facts.sessions.iter().any(|session| session.token == token)
}

fn parse_head(head: &[u8]) -> Option<Head> {
    let text = std::str::from_utf8(head).ok()?;
    let mut lines = text.split("\r\n");
    let status = lines
        .next()?
        .strip_prefix("HTTP/1.1 ")?
        .get(..3)?
        .parse()
        .ok()?;
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse().ok())?
    })?;
    Some(Head { status, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(expect: Expect, facts: &mut Facts) -> Http {
        let mut http = Http::new(0, 1, None);
        http.write(facts, expect, &mut Vec::new());
        http
    }

    fn response(status: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = format!(
            "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_page_is_checked_however_it_is_cut() {
        let mut facts = Facts::new("t".to_owned(), true);
        let good = response(200, &facts.page[..1000]);
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        for cut in [1, 7, 19, 40, 41, 42, 500] {
            let mut http = asked(Expect::Page { length: 1000 }, &mut facts);
            let answers: usize = good
                .chunks(cut)
                .map(|chunk| http.hear(&mut facts, chunk).unwrap())
                .sum();
            assert_eq!((answers, facts.wrong_count()), (1, 0), "cut {cut}");
        }
        let mut http = asked(Expect::Page { length: 1000 }, &mut facts);
        assert_eq!(http.hear(&mut facts, &bad).unwrap(), 1);
        assert_eq!(facts.wrong_count(), 1);
    }

    #[test]
    fn a_forgotten_session_is_wrong() {
        let mut facts = Facts::new("t".to_owned(), false);
        let mut http = asked(Expect::Login, &mut facts);
        http.hear(&mut facts, &response(200, b"abc\n")).unwrap();
        assert_eq!(facts.sessions[0].token, "abc");
        let mut http = asked(Expect::Session { index: 0 }, &mut facts);
        http.hear(&mut facts, &response(404, b"")).unwrap();
        assert_eq!(facts.wrong_count(), 1);
    }

    #[test]
    fn a_counter_that_repeats_is_wrong() {
        let mut facts = Facts::new("t".to_owned(), false);
        for (value, wrong) in [(b"5", 0), (b"6", 0), (b"6", 1)] {
            let floor = facts.posts.floor();
            let mut http = asked(Expect::Counter { floor }, &mut facts);
            http.hear(&mut facts, &response(200, value)).unwrap();
            assert_eq!(facts.wrong_count(), wrong);
        }
    }

    #[test]
    fn surplus_bytes_break_the_connection() {
        let mut facts = Facts::new("t".to_owned(), true);
        let mut http = asked(Expect::NoSession, &mut facts);
        let mut bytes = response(404, b"no");
        bytes.push(b'x');
        assert!(http.hear(&mut facts, &bytes).is_err());
        assert!(
            asked(Expect::NoSession, &mut facts)
                .hear(&mut facts, b"SSH-2.0\r\n\r\n")
                .is_err()
        );
    }
}
