//! Commands against a fresh store, in redis's words.

use super::execute;
use crate::resp::scan::{Scan, Scanner};
use crate::world::World;
use crate::world::fake::{Fake, world};

struct Client {
    world: World,
    fake: Fake,
}

impl Client {
    fn new() -> Self {
        let (world, fake) = world();
        Self { world, fake }
    }

    fn run(&mut self, words: &[&[u8]]) -> String {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        let mut scanner = Scanner::default();
        assert_eq!(scanner.scan(&request), Ok(Scan::Command(request.len())));
        let mut out = Vec::new();
        execute(scanner.args(&request), &mut self.world, &mut out);
        String::from_utf8_lossy(&out).replace("\r\n", "|")
    }

    /// Runs a command line of plain words.
    fn say(&mut self, line: &str) -> String {
        let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
        self.run(&words)
    }

    fn pass_ms(&mut self, ms: u64) {
        self.fake
            .wall_ns
            .set(self.fake.wall_ns.get() + ms * 1_000_000);
    }

    /// Runs each line and compares the reply.
    fn script(&mut self, lines: &[(&str, &str)]) {
        for (line, reply) in lines {
            assert_eq!(self.say(line), *reply, "{line}");
        }
    }
}

const WRONG_TYPE: &str = "-WRONGTYPE Operation against a key holding the wrong kind of value|";
const NOT_INTEGER: &str = "-ERR value is not an integer or out of range|";

#[test]
fn strings() {
    Client::new().script(&[
        ("GET a", "$-1|"),
        ("SET a 1", "+OK|"),
        ("get a", "$1|1|"),
        ("SET a 2 NX", "$-1|"),
        ("SET b 2 XX", "$-1|"),
        ("SET a 2 XX GET", "$1|1|"),
        ("SET a 3 NX XX", "-ERR syntax error|"),
        ("SET a 3 EX 0", "-ERR invalid expire time in 'set' command|"),
        (
            "SET a 3 EX 9223372036854775807",
            "-ERR invalid expire time in 'set' command|",
        ),
        ("SET a 3 EX x", NOT_INTEGER),
        ("INCR a", ":3|"),
        ("INCRBY a -5", ":-2|"),
        ("DECR a", ":-3|"),
        (
            "DECRBY a -9223372036854775808",
            "-ERR decrement would overflow|",
        ),
        ("SET a 9223372036854775807", "+OK|"),
        ("INCR a", "-ERR increment or decrement would overflow|"),
        ("SET a x", "+OK|"),
        ("INCR a", NOT_INTEGER),
        ("APPEND a yz", ":3|"),
        ("STRLEN a", ":3|"),
        ("MSET a 1 b 2", "+OK|"),
        (
            "MSET a 1 b",
            "-ERR wrong number of arguments for 'mset' command|",
        ),
        ("MGET a nothing b", "*3|$1|1|$-1|$1|2|"),
        ("GETSET a 5", "$1|1|"),
        ("GETDEL a", "$1|5|"),
        ("SETNX a 1", ":1|"),
        ("SETNX a 1", ":0|"),
        ("GET", "-ERR wrong number of arguments for 'get' command|"),
        (
            "GET a b",
            "-ERR wrong number of arguments for 'get' command|",
        ),
        ("DEL a b c", ":2|"),
        ("DBSIZE", ":0|"),
    ]);
}

#[test]
fn lists() {
    Client::new().script(&[
        ("RPUSH l b c", ":2|"),
        ("LPUSH l a", ":3|"),
        ("LRANGE l 0 -1", "*3|$1|a|$1|b|$1|c|"),
        ("LRANGE l -2 100", "*2|$1|b|$1|c|"),
        ("LRANGE l 2 1", "*0|"),
        ("LRANGE l x 1", NOT_INTEGER),
        ("LLEN l", ":3|"),
        ("GET l", WRONG_TYPE),
        ("SADD l x", WRONG_TYPE),
        ("TYPE l", "+list|"),
        ("LPOP l", "$1|a|"),
        ("RPOP l 5", "*2|$1|c|$1|b|"),
        ("LPOP l", "$-1|"),
        ("LPOP l 2", "*-1|"),
        ("LPOP l -2", "-ERR value is out of range, must be positive|"),
        ("EXISTS l", ":0|"),
    ]);
}

#[test]
fn sets() {
    let mut client = Client::new();
    client.script(&[
        ("SADD s a b a", ":2|"),
        ("SCARD s", ":2|"),
        ("SISMEMBER s b", ":1|"),
        ("SMEMBERS s", "*2|$1|a|$1|b|"),
        ("SREM s a x", ":1|"),
        ("SPOP s", "$1|b|"),
        ("SPOP s", "$-1|"),
        ("SPOP s 3", "*0|"),
        ("EXISTS s", ":0|"),
        ("LPUSH s a", ":1|"),
        ("SPOP s", WRONG_TYPE),
    ]);
    assert_eq!(client.say("FLUSHALL"), "+OK|");
    assert_eq!(client.world.store.used, 0);
}

#[test]
fn expiry_by_the_wall_clock() {
    let mut client = Client::new();
    client.script(&[
        ("SET a 1 EX 10", "+OK|"),
        ("TTL a", ":10|"),
        ("SET b 1 PX 1500", "+OK|"),
        ("PTTL b", ":1500|"),
        ("SET c 1", "+OK|"),
        ("TTL c", ":-1|"),
        ("TTL nothing", ":-2|"),
        ("EXPIRE c 5 XX", ":0|"),
        ("EXPIRE c 5", ":1|"),
        ("PERSIST c", ":1|"),
        ("PERSIST c", ":0|"),
        ("SET a 2 KEEPTTL", "+OK|"),
        ("TTL a", ":10|"),
    ]);
    client.pass_ms(1500);
    client.script(&[
        ("GET b", "$-1|"),
        ("GET a", "$1|2|"),
        ("EXPIRE a -1", ":1|"),
        ("EXISTS a", ":0|"),
        ("DBSIZE", ":1|"),
        (
            "EXPIRE c 9223372036854775807",
            "-ERR invalid expire time in 'expire' command|",
        ),
    ]);
}

#[test]
fn keys_and_globs() {
    use super::keys::matches;
    let mut client = Client::new();
    client.say("MSET key1 1 key2 2 other 3");
    client.script(&[
        ("KEYS key?", "*2|$4|key1|$4|key2|"),
        ("KEYS none", "*0|"),
        ("TYPE key1", "+string|"),
        ("TYPE none", "+none|"),
    ]);
    for _ in 0..20 {
        let key = client.say("RANDOMKEY");
        assert!(
            ["$4|key1|", "$4|key2|", "$5|other|"].contains(&key.as_str()),
            "{key}"
        );
    }
    let good = [
        ("*", ""),
        ("a*b*c", "aXXbYbc"),
        ("[a-c]x", "bx"),
        ("[^a]", "b"),
        ("\\*", "*"),
    ];
    for (pattern, text) in good {
        assert!(
            matches(pattern.as_bytes(), text.as_bytes()),
            "{pattern} {text}"
        );
    }
    for (pattern, text) in [("a*b", "ac"), ("?", ""), ("[a", "b"), ("", "x"), ("a", "")] {
        assert!(
            !matches(pattern.as_bytes(), text.as_bytes()),
            "{pattern} {text}"
        );
    }
    assert!(!matches(&b"*a".repeat(2000), &b"a".repeat(1999)));
}

#[test]
fn errors_in_redis_words() {
    Client::new().script(&[
        (
            "foo a b",
            "-ERR unknown command 'foo', with args beginning with: 'a' 'b' |",
        ),
        (
            "foo",
            "-ERR unknown command 'foo', with args beginning with: |",
        ),
        (
            "CONFIG set a b",
            "-ERR unknown subcommand 'set'. Try CONFIG HELP.|",
        ),
        ("SELECT 1", "-ERR DB index is out of range|"),
        ("HELLO 3", "-NOPROTO unsupported protocol version|"),
        ("CONFIG GET save", "*2|$4|save|$0||"),
        ("COMMAND DOCS", "*0|"),
        ("CLIENT SETINFO lib-name x", "+OK|"),
        ("PING hello", "$5|hello|"),
        ("TIME", "*2|$10|1700000000|$1|0|"),
    ]);
}

#[test]
fn memory_is_limited() {
    let mut client = Client::new();
    let value = [b'v'; 1000];
    let mut stored = 0;
    let refusal = loop {
        let key = format!("key{stored}");
        match client.run(&[b"SET", key.as_bytes(), &value]).as_str() {
            "+OK|" => stored += 1,
            other => break other.to_owned(),
        }
    };
    assert_eq!(
        refusal,
        "-OOM command not allowed when used memory > 'maxmemory'.|"
    );
    assert!((20..80).contains(&stored), "{stored}");
    assert_eq!(client.say("GET key0").len(), "$1000||".len() + 1000);
    assert_eq!(client.say("DEL key0 key1"), ":2|");
    assert_eq!(client.run(&[b"SET", b"again", &value]), "+OK|");
}

#[test]
fn expired_keys_make_room() {
    let mut client = Client::new();
    let value = [b'v'; 1000];
    for i in 0..100 {
        let key = format!("key{i}");
        client.run(&[b"SET", key.as_bytes(), &value, b"PX", b"10"]);
    }
    assert!(client.run(&[b"SET", b"more", &value]).starts_with("-OOM"));
    client.pass_ms(20);
    assert_eq!(client.run(&[b"SET", b"more", &value]), "+OK|");
    assert_eq!(client.say("DBSIZE"), ":1|");
}

#[test]
fn large_replies_are_refused() {
    let mut client = Client::new();
    let value = vec![b'v'; 30_000];
    assert_eq!(client.run(&[b"SET", b"big", &value]), "+OK|");
    let words: Vec<&[u8]> = std::iter::once(&b"MGET"[..])
        .chain([&b"big"[..]; 100])
        .collect();
    assert_eq!(client.run(&words), "-ERR reply exceeds 1 MiB|");
    client.world.buffers_held = client.world.buffers_max;
    assert!(
        client
            .say("GET big")
            .starts_with("-ERR reply buffers are full")
    );
    assert!(client.say("PING").starts_with("+PONG"));
}

#[test]
fn accounts_balance() {
    let mut client = Client::new();
    for line in [
        "SET a 1",
        "APPEND a 2345678901234567890",
        "INCR b",
        "LPUSH l a b c",
        "RPOP l 2",
        "SADD s a b",
        "SREM s a",
        "SPOP s",
        "SET l text",
        "GETSET b 9",
        "DEL a b l s",
        "RPUSH q 1",
        "LPOP q",
    ] {
        client.say(line);
    }
    assert_eq!(
        (client.say("DBSIZE"), client.world.store.used),
        (":0|".into(), 0)
    );
}
