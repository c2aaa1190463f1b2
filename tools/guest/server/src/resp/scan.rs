//! Cuts a byte stream into RESP commands, and resumes where the last bytes ended.
//!
//! Invariants: the commands found, and the error that ends a bad stream, do not depend on how the
//! stream is split; work per byte is bounded however slowly a large command arrives.
//!
//! Does not store the bytes of multi-bulk commands: arguments are ranges of the caller's buffer.

use alloc::vec::Vec;
use core::ops::Range;

/// Largest bulk string, and largest string value (redis: proto-max-bulk-len).
pub(crate) const BULK_MAX: usize = 512 * 1024;
/// Largest command, all arguments together.
pub(crate) const COMMAND_MAX: usize = 1024 * 1024;
/// Most arguments of a command.
const ARGS_MAX: i64 = 65_536;
/// Longest inline command and longest length line (redis: PROTO_INLINE_MAX_SIZE).
const LINE_MAX: usize = 64 * 1024;

/// Why a stream cannot be cut further, in redis's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProtocolError {
    Inline,
    CountLine,
    Count,
    LengthLine,
    Length,
    Quotes,
    Command,
    /// Another byte where `$` must be.
    Dollar(u8),
}

impl ProtocolError {
    /// The text behind `ERR Protocol error: `.
    pub fn text(self) -> &'static str {
        match self {
            Self::Inline => "too big inline request",
            Self::CountLine => "too big mbulk count string",
            Self::Count => "invalid multibulk length",
            Self::LengthLine => "too big bulk count string",
            Self::Length => "invalid bulk length",
            Self::Quotes => "unbalanced quotes in request",
            Self::Command => "too big request",
            Self::Dollar(_) => "expected '$', got '",
        }
    }
}

/// Result of a scan.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// The command is not complete.
    More,
    /// A command (perhaps without arguments: to be skipped) that takes so many bytes.
    Command(usize),
}

/// The arguments of one command.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
    text: &'a [u8],
    spans: &'a [Range<u32>],
}

impl<'a> Args<'a> {
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Argument `i`; empty when there is none.
    pub fn get(&self, i: usize) -> &'a [u8] {
        match self.spans.get(i) {
            Some(span) => &self.text[span.start as usize..span.end as usize],
            None => &[],
        }
    }

    /// The arguments from `from` on.
    pub fn from(&self, from: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let Self { text, spans } = *self;
        spans
            .iter()
            .skip(from)
            .map(|span| &text[span.start as usize..span.end as usize])
    }
}

/// The state of the command that is being cut. Positions count from its first byte.
#[derive(Default)]
pub(crate) struct Scanner {
    at: usize,
    /// Arguments still to come; `None` before the count line.
    missing: Option<u32>,
    /// Length of the argument that is being read.
    bulk: Option<usize>,
    spans: Vec<Range<u32>>,
    /// Unquoted arguments of an inline command.
    inline: Vec<u8>,
    is_inline: bool,
}

impl Scanner {
    /// Looks further into `text`, which starts at the first byte of the command and holds at least
    /// what the last call saw.
    pub fn scan(&mut self, text: &[u8]) -> Result<Scan, ProtocolError> {
        if self.missing.is_none() {
            match text.first() {
                None => return Ok(Scan::More),
                Some(b'*') => {
                    if !self.count_line(text)? {
                        return Ok(Scan::More);
                    }
                }
                Some(_) => return self.inline_line(text),
            }
        }
        while self.missing != Some(0) {
            if !self.argument(text)? {
                return Ok(Scan::More);
            }
        }
        Ok(Scan::Command(self.at))
    }

    /// The arguments of the command that [`Scanner::scan`] completed in `text`.
    pub fn args<'a>(&'a self, text: &'a [u8]) -> Args<'a> {
        let text = if self.is_inline { &self.inline } else { text };
        Args {
            text,
            spans: &self.spans,
        }
    }

    /// Gets ready for the next command.
    pub fn restart(&mut self) {
        self.at = 0;
        self.missing = None;
        self.bulk = None;
        self.spans.clear();
        if self.spans.capacity() > 1024 {
            self.spans = Vec::new();
        }
        self.inline.clear();
        self.is_inline = false;
    }

    /// Heap bytes held.
    pub fn held(&self) -> usize {
        self.spans.capacity() * size_of::<Range<u32>>() + self.inline.capacity()
    }

    fn count_line(&mut self, text: &[u8]) -> Result<bool, ProtocolError> {
        let Some((line, next)) = line_at(text, 1) else {
            return too_long(text.len(), ProtocolError::CountLine);
        };
        let count = parse_integer(line)
            .filter(|count| *count <= ARGS_MAX)
            .ok_or(ProtocolError::Count)?;
        self.missing = Some(count.max(0) as u32);
        self.at = next;
        Ok(true)
    }

    fn argument(&mut self, text: &[u8]) -> Result<bool, ProtocolError> {
        let len = match self.bulk {
            Some(len) => len,
            None => match self.length_line(text)? {
                Some(len) => len,
                None => return Ok(false),
            },
        };
        if text.len() < self.at + len + 2 {
            return Ok(false);
        }
        self.spans.push(self.at as u32..(self.at + len) as u32);
        self.at += len + 2;
        self.bulk = None;
        self.missing = self.missing.map(|missing| missing - 1);
        Ok(true)
    }

    fn length_line(&mut self, text: &[u8]) -> Result<Option<usize>, ProtocolError> {
        match text.get(self.at) {
            None => return Ok(None),
            Some(b'$') => {}
            Some(other) => return Err(ProtocolError::Dollar(*other)),
        }
        let Some((line, next)) = line_at(text, self.at + 1) else {
            too_long(text.len() - self.at, ProtocolError::LengthLine)?;
            return Ok(None);
        };
        let len = parse_integer(line)
            .and_then(|len| usize::try_from(len).ok())
            .filter(|len| *len <= BULK_MAX)
            .ok_or(ProtocolError::Length)?;
        if next + len > COMMAND_MAX {
            return Err(ProtocolError::Command);
        }
        self.at = next;
        self.bulk = Some(len);
        Ok(Some(len))
    }

    fn inline_line(&mut self, text: &[u8]) -> Result<Scan, ProtocolError> {
        let fresh = &text[self.at.min(text.len())..];
        let Some(end) = fresh.iter().position(|byte| *byte == b'\n') else {
            too_long(text.len(), ProtocolError::Inline)?;
            self.at = text.len();
            return Ok(Scan::More);
        };
        let end = self.at + end;
        if end > LINE_MAX {
            return Err(ProtocolError::Inline);
        }
        let line = &text[..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        self.is_inline = true;
        self.split_inline(line)?;
        Ok(Scan::Command(end + 1))
    }

    /// Splits at white space; knows redis's quotes.
    fn split_inline(&mut self, line: &[u8]) -> Result<(), ProtocolError> {
        let mut rest = line;
        loop {
            rest = rest.trim_ascii_start();
            if rest.is_empty() {
                return Ok(());
            }
            let start = self.inline.len() as u32;
            rest = match rest[0] {
                quote @ (b'"' | b'\'') => self.quoted(&rest[1..], quote)?,
                _ => self.bare(rest)?,
            };
            self.spans.push(start..self.inline.len() as u32);
        }
    }

    fn bare<'a>(&mut self, text: &'a [u8]) -> Result<&'a [u8], ProtocolError> {
        for (i, byte) in text.iter().enumerate() {
            match byte {
                b'"' | b'\'' => return self.quoted(&text[i + 1..], *byte),
                byte if byte.is_ascii_whitespace() => return Ok(&text[i..]),
                byte => self.inline.push(*byte),
            }
        }
        Ok(&[])
    }

    fn quoted<'a>(&mut self, text: &'a [u8], quote: u8) -> Result<&'a [u8], ProtocolError> {
        let mut i = 0;
        while let Some(byte) = text.get(i) {
            match *byte {
                byte if byte == quote => {
                    let rest = &text[i + 1..];
                    return match rest.first() {
                        Some(next) if !next.is_ascii_whitespace() => Err(ProtocolError::Quotes),
                        _ => Ok(rest),
                    };
                }
                b'\\' if i + 1 < text.len() => i += self.escape(&text[i + 1..], quote),
                byte => self.inline.push(byte),
            }
            i += 1;
        }
        Err(ProtocolError::Quotes)
    }

    /// Handles what follows a backslash; gives the number of bytes it took.
    fn escape(&mut self, text: &[u8], quote: u8) -> usize {
        if quote == b'\'' {
            if text[0] == b'\'' {
                self.inline.push(b'\'');
                return 1;
            }
            self.inline.push(b'\\');
            return 0;
        }
        if let [b'x', high, low, ..] = text
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            self.inline.push(high * 16 + low);
            return 3;
        }
        self.inline.push(match text[0] {
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'b' => 8,
            b'a' => 7,
            other => other,
        });
        1
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

/// `Err` when a line of which `seen` bytes came already is too long, else "not yet".
fn too_long(seen: usize, error: ProtocolError) -> Result<bool, ProtocolError> {
    if seen > LINE_MAX {
        Err(error)
    } else {
        Ok(false)
    }
}

/// The line that starts at `from`, and the position behind its line end.
fn line_at(text: &[u8], from: usize) -> Option<(&[u8], usize)> {
    let rest = text.get(from..)?;
    let end = rest.iter().position(|byte| *byte == b'\r')?;
    (end + 1 < rest.len()).then_some((&rest[..end], from + end + 2))
}

/// A decimal number as redis takes it: no sign but `-`, no leading zeros, no spaces.
pub(crate) fn parse_integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let canonical = match digits {
        [b'0'] => text.len() == 1,
        [b'1'..=b'9', ..] => text.len() <= 20,
        _ => false,
    };
    if !canonical {
        return None;
    }
    core::str::from_utf8(text).ok()?.parse().ok()
}
