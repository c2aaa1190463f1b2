//! Requests whole, cut everywhere, pipelined and broken.

use super::*;
use crate::pages::page_byte;
use crate::world::fake::world;

/// Feeds `pieces` to a new connection of a new world; gives all output, and whether it closes.
fn talk(pieces: &[&[u8]]) -> (String, bool) {
    let (mut world, _) = world();
    let (mut http, mut outbox, mut output) = (Http::default(), Outbox::default(), Vec::new());
    let mut drain = |outbox: &mut Outbox| {
        let mut buffer = [0; 1000];
        while !outbox.is_empty() {
            let n = outbox.fill(&mut buffer);
            output.extend_from_slice(&buffer[..n]);
        }
    };
    for piece in pieces {
        if !outbox.is_closing() {
            http.input(piece, &mut outbox, &mut world);
        }
        drain(&mut outbox);
        while http.is_stalled() && !outbox.is_closing() {
            http.input(&[], &mut outbox, &mut world);
            drain(&mut outbox);
        }
    }
    (String::from_utf8(output).unwrap(), outbox.is_closing())
}

fn answer(request: &str) -> (String, bool) {
    talk(&[request.as_bytes()])
}

fn ok(body: &str) -> String {
    let len = body.len();
    format!(
        "HTTP/1.1 200 OK\r\nServer: colo-guest\r\nContent-Type: text/plain\r\n\
         Content-Length: {len}\r\n\r\n{body}"
    )
}

#[test]
fn pages_have_the_documented_bytes() {
    for len in [0, 1, 251, 100_000, 1_048_576] {
        let (output, closed) = answer(&format!("GET /bytes/{len} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let page: String = (0..len).map(|i| char::from(page_byte(i))).collect();
        assert!(output == ok(&page), "{len} bytes");
        assert!(!closed);
    }
}

#[test]
fn every_cut_gives_the_same_responses() {
    let requests = "\r\nGET /bytes/300 HTTP/1.1\r\nHost: x\r\n\r\nPOST /counter HTTP/1.1\r\n\
        Content-Length: 5\r\n\r\nhelloGET /counter?x HTTP/1.1\nHost: x\n\nHEAD / HTTP/1.1\r\n\r\n\
        GET http://host/counter HTTP/1.1\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n\r\n";
    let whole = answer(requests);
    assert_eq!(whole.0.matches("HTTP/1.1 200 OK").count(), 5, "{}", whole.0);
    assert!(whole.1 && whole.0.ends_with("Connection: close\r\n\r\n1\n"));
    for cut in 0..requests.len() {
        let (first, second) = requests.as_bytes().split_at(cut);
        assert_eq!(talk(&[first, second]), whole, "cut at {cut}");
    }
    assert_eq!(
        talk(&requests.as_bytes().chunks(1).collect::<Vec<_>>()),
        whole
    );
}

#[test]
fn sessions_know_only_tokens_given_out() {
    let (mut world, _) = world();
    let (mut http, mut outbox) = (Http::default(), Outbox::default());
    let mut ask = |request: String| {
        http.input(request.as_bytes(), &mut outbox, &mut world);
        let mut buffer = [0; 1000];
        let n = outbox.fill(&mut buffer);
        String::from_utf8_lossy(&buffer[..n]).into_owned()
    };
    let login = ask("POST /login HTTP/1.1\r\n\r\n".into());
    let token = &login[login.len() - 32..];
    assert_eq!(
        ask(format!("GET /session/{token} HTTP/1.1\r\n\r\n")),
        ok("login 1\n")
    );
    for wrong in [
        &token.replace(&token[..1], "z"),
        &token[1..],
        "",
        &format!("+{}", &token[1..]),
    ] {
        let response = ask(format!("GET /session/{wrong} HTTP/1.1\r\n\r\n"));
        assert!(response.starts_with("HTTP/1.1 404 "), "{wrong}");
    }
}

#[test]
fn bad_requests_get_their_status() {
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(9000));
    let cases = [
        ("nonsense\r\n\r\n", 400, true),
        ("GET /\r\n\r\n", 400, true),
        ("GET  / HTTP/1.1\r\n\r\n", 400, true),
        ("GET x HTTP/1.1\r\n\r\n", 400, true),
        ("GET / HTTP/1.1\r\nNo colon\r\n\r\n", 400, true),
        ("POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, true),
        (
            "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
            true,
        ),
        (
            "POST /counter HTTP/1.1\r\nContent-Length: 65537\r\n\r\n",
            413,
            true,
        ),
        (
            "POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            413,
            true,
        ),
        (
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            501,
            true,
        ),
        ("GET / HTTP/3.0\r\n\r\n", 505, true),
        (long.as_str(), 431, true),
        ("GET /none HTTP/1.1\r\n\r\n", 404, false),
        ("GET /bytes/1048577 HTTP/1.1\r\n\r\n", 404, false),
        ("GET /bytes/+1 HTTP/1.1\r\n\r\n", 404, false),
        ("DELETE / HTTP/1.1\r\n\r\n", 405, false),
        ("PUT /counter HTTP/1.1\r\n\r\n", 405, false),
        ("GET /login HTTP/1.1\r\n\r\n", 405, false),
    ];
    for (request, status, closes) in cases {
        let (output, closed) = answer(request);
        assert!(
            output.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request}: {output}"
        );
        assert_eq!(closed, closes, "{request}");
    }
}

#[test]
fn http_1_0_is_told_whether_the_connection_stays() {
    let (output, closed) = answer("GET /counter HTTP/1.0\r\n\r\n");
    assert!(closed && output.contains("\r\nConnection: close\r\n"));
    let (output, closed) = answer("GET /counter HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n");
    assert!(!closed && output.contains("\r\nConnection: keep-alive\r\n"));
}

#[test]
fn a_body_that_waits_is_asked_for() {
    let (output, _) =
        answer("POST /counter HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx");
    assert_eq!(
        output,
        format!("HTTP/1.1 100 Continue\r\n\r\n{}", ok("1\n"))
    );
}

#[test]
fn garbage_never_panics() {
    let mut state = 3u64;
    for _ in 0..2000 {
        let mut input = Vec::new();
        for _ in 0..50 {
            state = crate::hash::scramble(state);
            let alphabet = b"GET /:\r\n\r\n\nPOST HTTP/1.1 0\x00\xff";
            input.push(alphabet[(state % alphabet.len() as u64) as usize]);
        }
        let whole = talk(&[&input]);
        let cut = (state % 50) as usize;
        assert_eq!(talk(&[&input[..cut], &input[cut..]]), whole, "{input:?}");
    }
}

#[test]
fn pages_are_written_on_request_as_far_as_there_is_memory() {
    let post = |what: &str| answer(&format!("POST /dirty/{what} HTTP/1.1\r\n\r\n")).0;
    assert_eq!(post("10/75/4096"), ok("10\n"));
    assert!(post("9999999/0/8").starts_with("HTTP/1.1 507 "));
    for odd in [
        "10/75",
        "10/101/8",
        "10/75/0",
        "10/75/4097",
        "x/1/8",
        "1/1/8/1",
        "-1/1/8",
    ] {
        assert!(post(odd).starts_with("HTTP/1.1 404 "), "{odd}");
    }
    let (read, _) = answer("GET /dirty/1/1/1 HTTP/1.1\r\n\r\n");
    assert!(read.starts_with("HTTP/1.1 405 "));
}
