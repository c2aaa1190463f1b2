//! Writes RESP2 replies.

use alloc::vec::Vec;

/// Largest reply to one command.
pub(crate) const REPLY_MAX: usize = 1024 * 1024;

/// Why a command is refused, in redis's words where redis has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    WrongType,
    NotInteger,
    Overflow,
    DecrementOverflow,
    NotPositive,
    Syntax,
    TooLong,
    NoProto,
    OutOfMemory,
    Database,
    ReplySize,
    BuffersFull,
    /// An expiry time that overflows, in the named command.
    ExpireTime(&'static str),
    /// Wrong number of arguments of the named command.
    Arity(&'static str),
}

impl Refusal {
    /// Appends the error reply.
    pub fn write(self, out: &mut Vec<u8>) {
        let text = match self {
            Self::WrongType => "WRONGTYPE Operation against a key holding the wrong kind of value",
            Self::NotInteger => "ERR value is not an integer or out of range",
            Self::Overflow => "ERR increment or decrement would overflow",
            Self::DecrementOverflow => "ERR decrement would overflow",
            Self::NotPositive => "ERR value is out of range, must be positive",
            Self::Syntax => "ERR syntax error",
            Self::TooLong => "ERR string exceeds maximum allowed size (proto-max-bulk-len)",
            Self::NoProto => "NOPROTO unsupported protocol version",
            Self::OutOfMemory => "OOM command not allowed when used memory > 'maxmemory'.",
            Self::Database => "ERR DB index is out of range",
            Self::ReplySize => "ERR reply exceeds 1 MiB",
            Self::BuffersFull => "ERR reply buffers are full, read the replies that are due",
            Self::ExpireTime(command) => {
                return error(
                    out,
                    &[
                        b"ERR invalid expire time in '",
                        command.as_bytes(),
                        b"' command",
                    ],
                );
            }
            Self::Arity(command) => {
                let start = b"ERR wrong number of arguments for '";
                return error(out, &[start, command.as_bytes(), b"' command"]);
            }
        };
        error(out, &[text.as_bytes()]);
    }
}

/// `-...`; line ends inside become spaces.
pub(crate) fn error(out: &mut Vec<u8>, parts: &[&[u8]]) {
    out.push(b'-');
    for byte in parts.iter().flat_map(|part| part.iter()) {
        out.push(if matches!(byte, b'\r' | b'\n') {
            b' '
        } else {
            *byte
        });
    }
    out.extend_from_slice(b"\r\n");
}

/// `+...`.
pub(crate) fn simple(out: &mut Vec<u8>, text: &str) {
    out.push(b'+');
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// `+OK`.
pub(crate) fn ok(out: &mut Vec<u8>) {
    out.extend_from_slice(b"+OK\r\n");
}

/// `:n`.
pub(crate) fn integer(out: &mut Vec<u8>, value: i64) {
    header(out, b':', value);
}

/// A bulk string.
pub(crate) fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    header(out, b'$', bytes.len() as i64);
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// The null bulk string.
pub(crate) fn nil(out: &mut Vec<u8>) {
    out.extend_from_slice(b"$-1\r\n");
}

/// The null array.
pub(crate) fn nil_array(out: &mut Vec<u8>) {
    out.extend_from_slice(b"*-1\r\n");
}

/// The head of an array of `len` replies.
pub(crate) fn array(out: &mut Vec<u8>, len: usize) {
    header(out, b'*', len as i64);
}

/// Bytes that [`bulk`] takes at most for a string of `len` bytes.
pub(crate) fn bulk_size(len: usize) -> usize {
    len + 16
}

fn header(out: &mut Vec<u8>, kind: u8, value: i64) {
    out.push(kind);
    decimal(out, value);
    out.extend_from_slice(b"\r\n");
}

/// Appends `value` in decimal.
pub(crate) fn decimal(out: &mut Vec<u8>, value: i64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut rest = value.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if value < 0 {
        out.push(b'-');
    }
    out.extend_from_slice(&digits[at..]);
}
