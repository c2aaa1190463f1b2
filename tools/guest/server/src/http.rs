//! One HTTP/1.1 connection: requests in, responses out, with keep-alive and pipelining.
//!
//! Paths: `/` a small page; `/bytes/N` a page of N bytes (N up to 1048576, content as
//! [`crate::page_byte`]); `/counter` (GET reads, POST adds one and gives the new value); `/time`
//! microseconds since 1970; `/random` 16 hexadecimal digits; `POST /login` a new token of 32
//! hexadecimal digits; `POST /dirty/PAGES/SAME/BYTES` changes so many pages of memory, BYTES of each, SAME of a
//! hundred of them alike on two guests, and answers the number of pages; `/session/TOKEN` the number of the login that got the token, 404 for one
//! that was never given out. Text bodies end with a line end, the token does not.
//!
//! Invariants: responses do not depend on how the bytes are split; they come in the order of the
//! requests; a page is made while it is sent and never held whole.
//!
//! Does not send a `Date` header: it would make every response differ between two guests in
//! lockstep.

use crate::arena::{Dirty, PAGE_BYTES};
use crate::outbox::Outbox;
use crate::pages::Page;
use crate::resp::reply::decimal;
use crate::world::World;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Longest request line and header fields.
const HEAD_MAX: usize = 8 * 1024;
/// Longest request body.
const BODY_MAX: u64 = 64 * 1024;
/// Largest page.
const PAGE_MAX: usize = 1024 * 1024;

/// A connection's unfinished input.
#[derive(Default)]
pub(crate) struct Http {
    pending: Vec<u8>,
    body: Option<Body>,
    stalled: bool,
}

/// A request whose body is still coming; the body itself is of no interest.
struct Body {
    left: u64,
    request: Request,
}

struct Request {
    method: Method,
    path: String,
    keep_alive: bool,
    /// The client speaks HTTP/1.0 and must be told that the connection stays open.
    is_http_1_0: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Get,
    Head,
    Post,
    Other,
}

/// A status line and what else belongs to it.
struct Status {
    line: &'static str,
    field: &'static str,
}

const fn status(line: &'static str) -> Status {
    Status { line, field: "" }
}

const OK: Status = status("200 OK");
const BAD_REQUEST: Status = status("400 Bad Request");
const NOT_FOUND: Status = status("404 Not Found");
const GET_ONLY: Status = Status {
    line: "405 Method Not Allowed",
    field: "Allow: GET, HEAD\r\n",
};
const POST_ONLY: Status = Status {
    line: "405 Method Not Allowed",
    field: "Allow: POST\r\n",
};
const GET_OR_POST: Status = Status {
    line: "405 Method Not Allowed",
    field: "Allow: GET, HEAD, POST\r\n",
};
const TOO_LARGE: Status = status("413 Content Too Large");
const HEAD_TOO_LARGE: Status = status("431 Request Header Fields Too Large");
const NO_MEMORY: Status = status("507 Insufficient Storage");
const NOT_IMPLEMENTED: Status = status("501 Not Implemented");
const VERSION: Status = status("505 HTTP Version Not Supported");

const FRONT_PAGE: &str = "<!doctype html><title>colo-guest</title>\n<h1>It works, twice.</h1>\n\
    <p>/bytes/N /counter /time /random /login /session/TOKEN /dirty/PAGES/SAME/BYTES\n";

impl Http {
    /// Takes all of `src` and answers what is complete, as long as the outbox is ready.
    pub fn input(&mut self, src: &[u8], outbox: &mut Outbox, world: &mut World) {
        if self.pending.is_empty() {
            let used = self.answer(src, outbox, world);
            self.pending.extend_from_slice(&src[used..]);
            return;
        }
        let mut pending = core::mem::take(&mut self.pending);
        pending.extend_from_slice(src);
        let used = self.answer(&pending, outbox, world);
        pending.drain(..used);
        if !pending.is_empty() {
            self.pending = pending;
        }
    }

    /// True when [`Http::input`] with no bytes makes progress once the outbox is ready.
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Heap bytes held.
    pub fn held(&self) -> usize {
        self.pending.capacity()
    }

    /// Answers the requests at the front of `text`; gives the number of bytes they took.
    fn answer(&mut self, text: &[u8], outbox: &mut Outbox, world: &mut World) -> usize {
        let mut used = 0;
        self.stalled = false;
        loop {
            if outbox.is_closing() {
                return text.len();
            }
            let rest = &text[used..];
            if !outbox.ready() {
                self.stalled = !rest.is_empty();
                return used;
            }
            if let Some(mut body) = self.body.take() {
                let taken = body.left.min(rest.len() as u64);
                body.left -= taken;
                used += taken as usize;
                if body.left > 0 {
                    self.body = Some(body);
                    return used;
                }
                respond(&body.request, outbox, world);
                continue;
            }
            match head_end(rest) {
                None if rest.len() > HEAD_MAX => refuse(&HEAD_TOO_LARGE, outbox),
                None => return used,
                Some(end) if end > HEAD_MAX => refuse(&HEAD_TOO_LARGE, outbox),
                Some(end) => {
                    used += end;
                    match parse_head(&rest[..end]) {
                        Ok(None) => {}
                        Ok(Some(head)) => self.begin(head, outbox),
                        Err(status) => refuse(&status, outbox),
                    }
                }
            }
        }
    }

    fn begin(&mut self, head: Head, outbox: &mut Outbox) {
        if head.body_len > BODY_MAX {
            return refuse(&TOO_LARGE, outbox);
        }
        if head.expects_continue && head.body_len > 0 {
            outbox
                .bytes()
                .extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        self.body = Some(Body {
            left: head.body_len,
            request: head.request,
        });
    }
}

/// Length of the head at the front of `text`, its empty line included. An empty line in front of a
/// request counts as a head of its own.
fn head_end(text: &[u8]) -> Option<usize> {
    match text {
        [b'\n', ..] => return Some(1),
        [b'\r', b'\n', ..] => return Some(2),
        _ => {}
    }
    let limit = text.len().min(HEAD_MAX + 4);
    let mut from = 0;
    loop {
        let line_end = from + text[from..limit].iter().position(|byte| *byte == b'\n')?;
        from = line_end + 1;
        match text[from..limit] {
            [b'\n', ..] => return Some(from + 1),
            [b'\r', b'\n', ..] => return Some(from + 2),
            _ => {}
        }
    }
}

struct Head {
    request: Request,
    body_len: u64,
    expects_continue: bool,
}

/// Parses a head; `None` for an empty line in front of a request.
fn parse_head(text: &[u8]) -> Result<Option<Head>, Status> {
    let text = core::str::from_utf8(text).map_err(|_| BAD_REQUEST)?;
    let mut lines = text
        .split('\n')
        .map(|line| line.strip_suffix('\r').unwrap_or(line));
    let first = lines.next().unwrap_or_default();
    if first.is_empty() {
        return Ok(None);
    }
    let mut head = parse_request_line(first)?;
    let mut seen_length = None;
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').ok_or(BAD_REQUEST)?;
        if name.is_empty() || name.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err(BAD_REQUEST);
        }
        let value = value.trim_matches([' ', '\t']);
        if name.eq_ignore_ascii_case("content-length") {
            head.body_len = parse_length(value)?;
            if seen_length
                .replace(head.body_len)
                .is_some_and(|seen| seen != head.body_len)
            {
                return Err(BAD_REQUEST);
            }
        } else if name.eq_ignore_ascii_case("connection") {
            for word in value.split(',').map(str::trim) {
                if word.eq_ignore_ascii_case("close") {
                    head.request.keep_alive = false;
                } else if word.eq_ignore_ascii_case("keep-alive") && head.request.is_http_1_0 {
                    head.request.keep_alive = true;
                }
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(NOT_IMPLEMENTED);
        } else if name.eq_ignore_ascii_case("expect") {
            head.expects_continue = value.eq_ignore_ascii_case("100-continue");
        }
    }
    Ok(Some(head))
}

fn parse_length(value: &str) -> Result<u64, Status> {
    if value.is_empty() || value.bytes().any(|byte| !byte.is_ascii_digit()) {
        return Err(BAD_REQUEST);
    }
    Ok(value.parse().unwrap_or(u64::MAX))
}

fn parse_request_line(line: &str) -> Result<Head, Status> {
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(BAD_REQUEST);
    };
    let is_http_1_0 = match version {
        "HTTP/1.1" => false,
        "HTTP/1.0" => true,
        other if other.starts_with("HTTP/") => return Err(VERSION),
        _ => return Err(BAD_REQUEST),
    };
    let method = match method {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "POST" => Method::Post,
        other if !other.is_empty() && other.bytes().all(|b| b.is_ascii_alphabetic()) => {
            Method::Other
        }
        _ => return Err(BAD_REQUEST),
    };
    let path = match target.strip_prefix("http://") {
        Some(absolute) => absolute.find('/').map_or("/", |at| &absolute[at..]),
        None => target,
    };
    if !path.starts_with('/') || path.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(BAD_REQUEST);
    }
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let request = Request {
        method,
        path: String::from(path),
        keep_alive: !is_http_1_0,
        is_http_1_0,
    };
    Ok(Head {
        request,
        body_len: 0,
        expects_continue: false,
    })
}

/// What a response carries.
enum Content {
    Text(String),
    Page(usize),
}

/// Answers a request that cannot be understood, and closes: where the next one starts is unknown.
fn refuse(status: &Status, outbox: &mut Outbox) {
    let body = format!("{}\n", status.line);
    write_head(status, body.len(), Some("close"), outbox.bytes());
    outbox.bytes().extend_from_slice(body.as_bytes());
    outbox.close();
}

fn respond(request: &Request, outbox: &mut Outbox, world: &mut World) {
    let (status, content) = match route(request, world) {
        Ok(content) => (OK, content),
        Err(status) => {
            let text = format!("{}\n", status.line);
            (status, Content::Text(text))
        }
    };
    let len = match &content {
        Content::Text(text) => text.len(),
        Content::Page(len) => *len,
    };
    let connection = match (request.keep_alive, request.is_http_1_0) {
        (false, _) => Some("close"),
        (true, true) => Some("keep-alive"),
        (true, false) => None,
    };
    write_head(&status, len, connection, outbox.bytes());
    if request.method != Method::Head {
        match content {
            Content::Text(text) => outbox.bytes().extend_from_slice(text.as_bytes()),
            Content::Page(len) => outbox.send_page(Page::new(len)),
        }
    }
    if !request.keep_alive {
        outbox.close();
    }
}

fn write_head(status: &Status, len: usize, connection: Option<&str>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status.line.as_bytes());
    out.extend_from_slice(
        b"\r\nServer: colo-guest\r\nContent-Type: text/plain\r\nContent-Length: ",
    );
    decimal(out, len as i64);
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(status.field.as_bytes());
    if let Some(connection) = connection {
        out.extend_from_slice(b"Connection: ");
        out.extend_from_slice(connection.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

fn route(request: &Request, world: &mut World) -> Result<Content, Status> {
    let reads = matches!(request.method, Method::Get | Method::Head);
    let posts = request.method == Method::Post;
    let read = |content| if reads { Ok(content) } else { Err(GET_ONLY) };
    let path = request.path.as_str();
    match path {
        "/" => read(Content::Text(String::from(FRONT_PAGE))),
        "/time" => read(Content::Text(format!(
            "{}\n",
            world.platform.wall_ns() / 1000
        ))),
        "/random" => read(Content::Text(format!("{:016x}\n", world.random()))),
        "/link" => read(Content::Text(format!(
            "{} {}\n",
            if world.link_is_up { "up" } else { "down" },
            world.link_changes
        ))),
        "/counter" if reads || posts => {
            world.counter += u64::from(posts);
            Ok(Content::Text(format!("{}\n", world.counter)))
        }
        "/counter" => Err(GET_OR_POST),
        "/login" if posts => {
            let entropy = [world.platform.entropy(), world.platform.entropy()];
            Ok(Content::Text(format!(
                "{:032x}",
                world.sessions.login(entropy)
            )))
        }
        "/login" => Err(POST_ONLY),
        _ => {
            if let Some(len) = path.strip_prefix("/bytes/") {
                return read(Content::Page(page_len(len)?));
            }
            if let Some(what) = path.strip_prefix("/dirty/") {
                let dirty = parse_dirty(what).ok_or(NOT_FOUND)?;
                return if posts {
                    write_pages(dirty, world)
                } else {
                    Err(POST_ONLY)
                };
            }
            let token = path.strip_prefix("/session/").ok_or(NOT_FOUND)?;
            let login = parse_token(token).and_then(|token| world.sessions.find(token));
            read(Content::Text(format!(
                "login {}\n",
                login.ok_or(NOT_FOUND)?
            )))
        }
    }
}

fn write_pages(dirty: Dirty, world: &mut World) -> Result<Content, Status> {
    let platform = &world.platform;
    match world.arena.write(dirty, || platform.entropy()) {
        true => Ok(Content::Text(format!("{}\n", dirty.pages))),
        false => Err(NO_MEMORY),
    }
}

fn parse_dirty(text: &str) -> Option<Dirty> {
    let number = |text: &str| {
        let digits =
            !text.is_empty() && text.len() <= 7 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<usize>().ok().filter(|_| digits)
    };
    let mut parts = text.split('/');
    let pages = number(parts.next()?)?;
    let same_pct = number(parts.next()?).filter(|&pct| pct <= 100)?;
    let bytes = number(parts.next()?).filter(|bytes| (1..=PAGE_BYTES).contains(bytes))?;
    parts.next().is_none().then_some(Dirty {
        pages,
        same_pct,
        bytes,
    })
}

fn page_len(text: &str) -> Result<usize, Status> {
    let digits = !text.is_empty() && text.len() <= 7 && text.bytes().all(|b| b.is_ascii_digit());
    let len = text.parse().ok().filter(|len| digits && *len <= PAGE_MAX);
    len.ok_or(NOT_FOUND)
}

fn parse_token(text: &str) -> Option<u128> {
    let hex = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if hex {
        u128::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
