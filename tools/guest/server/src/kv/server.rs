//! Commands about the connection and the server.

use super::commands::{count, unknown_subcommand};
use super::keys::matches;
use super::{Call, Outcome};
use crate::resp::reply::{self, Refusal};
use crate::resp::scan::BULK_MAX;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

pub(super) fn ping(call: &mut Call<'_>) -> Outcome {
    match call.args.len() {
        1 => reply::simple(call.out, "PONG"),
        2 => reply::bulk(call.out, call.arg(1)),
        _ => return Err(Refusal::Arity("ping")),
    }
    Ok(())
}

pub(super) fn echo(call: &mut Call<'_>) -> Outcome {
    call.bulk(call.arg(1))
}

pub(super) fn quit(call: &mut Call<'_>) -> Outcome {
    call.ok()
}

pub(super) fn reset(call: &mut Call<'_>) -> Outcome {
    reply::simple(call.out, "RESET");
    Ok(())
}

pub(super) fn select(call: &mut Call<'_>) -> Outcome {
    match call.integer_arg(1)? {
        0 => call.ok(),
        _ => Err(Refusal::Database),
    }
}

/// The wall clock: a natural divergence.
pub(super) fn time(call: &mut Call<'_>) -> Outcome {
    let wall_us = call.world.platform.wall_ns() / 1000;
    reply::array(call.out, 2);
    reply::bulk(call.out, (wall_us / 1_000_000).to_string().as_bytes());
    reply::bulk(call.out, (wall_us % 1_000_000).to_string().as_bytes());
    Ok(())
}

pub(super) fn hello(call: &mut Call<'_>) -> Outcome {
    if call.args.len() > 1 && call.arg(1) != b"2" {
        return Err(Refusal::NoProto);
    }
    let fields = [
        ("server", "redis"),
        ("version", VERSION),
        ("mode", "standalone"),
        ("role", "master"),
    ];
    reply::array(call.out, 2 * fields.len() + 4);
    for (name, value) in fields {
        reply::bulk(call.out, name.as_bytes());
        reply::bulk(call.out, value.as_bytes());
    }
    reply::bulk(call.out, b"proto");
    reply::integer(call.out, 2);
    reply::bulk(call.out, b"modules");
    reply::array(call.out, 0);
    Ok(())
}

/// The version whose words and replies the store follows.
const VERSION: &str = "7.0.15";

/// Nothing in here depends on time: two guests in lockstep answer alike.
pub(super) fn info(call: &mut Call<'_>) -> Outcome {
    let store = &call.world.store;
    let expiring = store
        .map
        .values()
        .filter(|entry| entry.expires_ms.is_some())
        .count();
    let mut text = String::new();
    let sections = [
        (
            "server",
            format!(
                "redis_version:{VERSION}\r\nredis_mode:standalone\r\nserver_name:colo-guest\r\n"
            ),
        ),
        (
            "memory",
            format!(
                "used_memory:{}\r\nmaxmemory:{}\r\nmaxmemory_policy:noeviction\r\n",
                store.used, store.max
            ),
        ),
        (
            "replication",
            "role:master\r\nconnected_slaves:0\r\n".to_string(),
        ),
        (
            "keyspace",
            match store.map.len() {
                0 => String::new(),
                keys => format!("db0:keys={keys},expires={expiring},avg_ttl=0\r\n"),
            },
        ),
    ];
    for (name, body) in sections {
        let wanted = |word: &[u8]| {
            [name, "all", "default", "everything"]
                .iter()
                .any(|w| word.eq_ignore_ascii_case(w.as_bytes()))
        };
        if call.args.len() == 1 || call.args.from(1).any(wanted) {
            if !text.is_empty() {
                text.push_str("\r\n");
            }
            text.push_str("# ");
            text.push_str(&name[..1].to_ascii_uppercase());
            text.push_str(&name[1..]);
            text.push_str("\r\n");
            text.push_str(&body);
        }
    }
    call.bulk(text.as_bytes())
}

pub(super) fn config(call: &mut Call<'_>) -> Outcome {
    if call.arg(1).eq_ignore_ascii_case(b"resetstat") {
        return call.ok();
    }
    if !call.arg(1).eq_ignore_ascii_case(b"get") {
        return unknown_subcommand(call, "CONFIG");
    }
    if call.args.len() < 3 {
        return Err(Refusal::Arity("config|get"));
    }
    let settings = [
        ("appendonly", "no".to_string()),
        ("databases", "1".to_string()),
        ("maxmemory", call.world.store.max.to_string()),
        ("maxmemory-policy", "noeviction".to_string()),
        ("proto-max-bulk-len", BULK_MAX.to_string()),
        ("save", String::new()),
    ];
    let wanted = |name: &str| {
        call.args
            .from(2)
            .any(|pattern| matches(&pattern.to_ascii_lowercase(), name.as_bytes()))
    };
    let found: Vec<_> = settings.iter().filter(|(name, _)| wanted(name)).collect();
    reply::array(call.out, 2 * found.len());
    for (name, value) in found {
        reply::bulk(call.out, name.as_bytes());
        reply::bulk(call.out, value.as_bytes());
    }
    Ok(())
}

pub(super) fn command(call: &mut Call<'_>) -> Outcome {
    if call.arg(1).eq_ignore_ascii_case(b"count") {
        return call.integer(count() as i64);
    }
    reply::array(call.out, 0);
    Ok(())
}

pub(super) fn client(call: &mut Call<'_>) -> Outcome {
    match call.arg(1).to_ascii_lowercase().as_slice() {
        b"setinfo" | b"setname" | b"no-evict" | b"no-touch" => call.ok(),
        b"getname" => call.nil(),
        _ => unknown_subcommand(call, "CLIENT"),
    }
}
