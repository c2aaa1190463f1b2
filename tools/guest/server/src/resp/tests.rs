//! Streams of commands, whole and cut everywhere.

use super::*;
use crate::world::fake::world;

/// Feeds `pieces` to a new connection of a new world; gives all output, and whether it closes.
fn talk(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
    let (mut world, _) = world();
    let (mut resp, mut outbox, mut output) = (Resp::default(), Outbox::default(), Vec::new());
    let mut drain = |outbox: &mut Outbox| {
        let mut buffer = [0; 1000];
        while !outbox.is_empty() {
            let n = outbox.fill(&mut buffer);
            output.extend_from_slice(&buffer[..n]);
        }
    };
    for piece in pieces {
        if !outbox.is_closing() {
            resp.input(piece, &mut outbox, &mut world);
        }
        drain(&mut outbox);
        while resp.is_stalled() {
            resp.input(&[], &mut outbox, &mut world);
            drain(&mut outbox);
        }
    }
    (output, outbox.is_closing())
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

const MIXED: &[u8] = b"PING\r\n*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$5\r\nva\r\nl\r\n*0\r\n\r\n\
    *2\r\n$3\r\nGET\r\n$3\r\nkey\r\nset inline \"a b\\x41\\n\" \r\n get inline\r\n*1\r\n$4\r\nQUIT\r\nPING\r\n";

#[test]
fn every_cut_gives_the_same_replies() {
    let whole = talk(&[MIXED]);
    assert_eq!(
        text(&whole.0),
        "+PONG\r\n+OK\r\n$5\r\nva\r\nl\r\n+OK\r\n$5\r\na bA\n\r\n+OK\r\n"
    );
    assert!(whole.1);
    for cut in 0..MIXED.len() {
        assert_eq!(talk(&[&MIXED[..cut], &MIXED[cut..]]), whole, "cut at {cut}");
    }
    let bytes: Vec<&[u8]> = MIXED.chunks(1).collect();
    assert_eq!(talk(&bytes), whole);
}

#[test]
fn protocol_errors_have_redis_words_and_close() {
    let cases: [(&[u8], &str); 9] = [
        (b"*x\r\n", "invalid multibulk length"),
        (b"*2000000\r\n", "invalid multibulk length"),
        (b"*1\r\n+PING\r\n", "expected '$', got '+'"),
        (b"*1\r\n$-1\r\n", "invalid bulk length"),
        (b"*1\r\n$524289\r\n", "invalid bulk length"),
        (b"*1\r\n$99999999999999999999\r\n", "invalid bulk length"),
        (b"get \"unfinished\r\n", "unbalanced quotes in request"),
        (b"get \"a\"b\r\n", "unbalanced quotes in request"),
        (&[b'a'; 70_000], "too big inline request"),
    ];
    for (input, message) in cases {
        let expected = format!("-ERR Protocol error: {message}\r\n");
        let pieces: Vec<&[u8]> = input.chunks(1000).collect();
        assert_eq!(talk(&pieces), (expected.into_bytes(), true), "{message}");
    }
}

#[test]
fn requests_beyond_the_limits_are_refused() {
    let mut input = b"*4\r\n".to_vec();
    for _ in 0..4 {
        input.extend_from_slice(b"$524288\r\n");
        input.extend_from_slice(&[b'x'; 524_288]);
        input.extend_from_slice(b"\r\n");
    }
    let (output, closed) = talk(&input.chunks(1460).collect::<Vec<_>>());
    assert_eq!(text(&output), "-ERR Protocol error: too big request\r\n");
    assert!(closed);
}

#[test]
fn garbage_never_panics() {
    let mut state = 7u64;
    for _ in 0..2000 {
        let mut input = Vec::new();
        for _ in 0..60 {
            state = crate::hash::scramble(state);
            let alphabet = b"*$\r\n0123-+\"'\\ xgset\x00\xff";
            input.push(alphabet[(state % alphabet.len() as u64) as usize]);
        }
        let whole = talk(&[&input]);
        let cut = (state % 60) as usize;
        assert_eq!(talk(&[&input[..cut], &input[cut..]]), whole, "{input:?}");
    }
}

#[test]
fn a_client_that_does_not_read_is_not_served() {
    let (mut world, _) = world();
    let (mut resp, mut outbox) = (Resp::default(), Outbox::default());
    let request = b"*2\r\n$4\r\nECHO\r\n$8\r\n12345678\r\n".repeat(20_000);
    resp.input(&request, &mut outbox, &mut world);
    assert!(resp.is_stalled());
    assert!(outbox.held() < 64 * 1024, "{}", outbox.held());
    let mut total = 0;
    let mut buffer = [0; 4096];
    loop {
        let n = outbox.fill(&mut buffer);
        total += n;
        if resp.is_stalled() {
            resp.input(&[], &mut outbox, &mut world);
        } else if n == 0 {
            break;
        }
    }
    assert_eq!(total, 20_000 * b"$8\r\n12345678\r\n".len());
}

#[test]
fn integers_are_canonical() {
    use scan::parse_integer;
    for good in [
        "0",
        "-1",
        "9223372036854775807",
        "-9223372036854775808",
        "42",
    ] {
        assert_eq!(parse_integer(good.as_bytes()), good.parse().ok());
    }
    for bad in [
        "",
        "-",
        "+1",
        "01",
        "-0",
        " 1",
        "1 ",
        "9223372036854775808",
        "1.0",
        "a",
    ] {
        assert_eq!(parse_integer(bad.as_bytes()), None, "{bad}");
    }
}
