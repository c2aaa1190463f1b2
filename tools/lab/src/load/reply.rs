//! Replies of the RESP 2 protocol, parsed from a growing buffer.
//!
//! Invariants: nesting and lengths are bounded; an incomplete reply consumes nothing.
//!
//! Does not know what was asked.

const BULK_MAX: usize = 16 << 20;
const ITEMS_MAX: usize = 1 << 20;
const DEPTH_MAX: usize = 4;

/// One reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reply {
    Simple(Vec<u8>),
    Error(Vec<u8>),
    Integer(i64),
    Bulk(Option<Vec<u8>>),
    Array(Option<Vec<Reply>>),
}

/// Takes one reply from the start of `bytes`: the reply and its length, `None` when it is incomplete.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<(Reply, usize)>, String> {
    parse_at(bytes, DEPTH_MAX)
}

fn parse_at(bytes: &[u8], depth: usize) -> Result<Option<(Reply, usize)>, String> {
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        if bytes.len() > 1 << 16 {
            return Err("a reply line without an end".to_owned());
        }
        return Ok(None);
    };
    let (line, used) = (&bytes[..end], end + 2);
    let Some((&kind, text)) = line.split_first() else {
        return Err("an empty reply line".to_owned());
    };
    match kind {
        b'+' => Ok(Some((Reply::Simple(text.to_vec()), used))),
        b'-' => Ok(Some((Reply::Error(text.to_vec()), used))),
        b':' => Ok(Some((Reply::Integer(number(text)?), used))),
        b'$' => parse_bulk(bytes, number(text)?, used),
        b'*' if depth > 0 => parse_array(bytes, number(text)?, used, depth),
        _ => Err(format!("reply line {:?}", String::from_utf8_lossy(line))),
    }
}

fn parse_bulk(bytes: &[u8], length: i64, at: usize) -> Result<Option<(Reply, usize)>, String> {
    if length == -1 {
        return Ok(Some((Reply::Bulk(None), at)));
    }
    let length = bounded(length, BULK_MAX)?;
    match bytes.get(at..at + length + 2) {
        Some(body) if body.ends_with(b"\r\n") => Ok(Some((
            Reply::Bulk(Some(body[..length].to_vec())),
            at + length + 2,
        ))),
        Some(_) => Err("a string longer than its length".to_owned()),
        None => Ok(None),
    }
}

fn parse_array(
    bytes: &[u8],
    count: i64,
    mut at: usize,
    depth: usize,
) -> Result<Option<(Reply, usize)>, String> {
    if count == -1 {
        return Ok(Some((Reply::Array(None), at)));
    }
    let mut items = Vec::new();
    for _ in 0..bounded(count, ITEMS_MAX)? {
        let Some((item, used)) = parse_at(&bytes[at..], depth - 1)? else {
            return Ok(None);
        };
        items.push(item);
        at += used;
    }
    Ok(Some((Reply::Array(Some(items)), at)))
}

fn bounded(length: i64, limit: usize) -> Result<usize, String> {
    let fits = usize::try_from(length)
        .ok()
        .filter(|&length| length <= limit);
    fits.ok_or_else(|| format!("length {length}"))
}

fn number(text: &[u8]) -> Result<i64, String> {
    let text = String::from_utf8_lossy(text);
    text.parse().map_err(|_| format!("number {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_parses_and_every_prefix_is_incomplete() {
        let bytes = b"*5\r\n+OK\r\n-ERR x\r\n:-7\r\n$3\r\na\r\n\r\n*2\r\n$-1\r\n*-1\r\n";
        let (reply, used) = parse(bytes).unwrap().unwrap();
        let expected = Reply::Array(Some(vec![
            Reply::Simple(b"OK".to_vec()),
            Reply::Error(b"ERR x".to_vec()),
            Reply::Integer(-7),
            Reply::Bulk(Some(b"a\r\n".to_vec())),
            Reply::Array(Some(vec![Reply::Bulk(None), Reply::Array(None)])),
        ]));
        assert_eq!((reply, used), (expected, bytes.len()));
        for end in 0..bytes.len() {
            assert_eq!(parse(&bytes[..end]), Ok(None), "{end}");
        }
    }

    #[test]
    fn garbage_is_an_error() {
        let cases: [&[u8]; 7] = [
            b"hello\r\n",
            b"\r\n",
            b":x\r\n",
            b"$-2\r\n",
            b"$99999999999\r\n",
            b"$1\r\nabc\r\n",
            b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n",
        ];
        for bytes in cases {
            assert!(
                parse(bytes).is_err(),
                "{:?}",
                String::from_utf8_lossy(bytes)
            );
        }
    }
}
