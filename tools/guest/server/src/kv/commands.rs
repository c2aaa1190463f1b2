//! The table of commands, and their dispatch.

use super::{Call, Outcome, keys, lists, server, sets, strings};
use crate::resp::After;
use crate::resp::reply::{self, Refusal};
use crate::resp::scan::Args;
use crate::world::World;
use alloc::vec::Vec;

/// Longest part of a client's argument that an error repeats (as redis).
const QUOTED_MAX: usize = 128;

/// A command: name, number of arguments with the name (negative: at least), whether it may add
/// data.
struct Command {
    name: &'static str,
    arity: i32,
    adds: bool,
    run: fn(&mut Call<'_>) -> Outcome,
}

const fn reads(name: &'static str, arity: i32, run: fn(&mut Call<'_>) -> Outcome) -> Command {
    Command {
        name,
        arity,
        adds: false,
        run,
    }
}

const fn adds(name: &'static str, arity: i32, run: fn(&mut Call<'_>) -> Outcome) -> Command {
    Command {
        name,
        arity,
        adds: true,
        run,
    }
}

/// Sorted by name.
static COMMANDS: [Command; 54] = [
    adds("append", 3, strings::append),
    reads("client", -2, server::client),
    reads("command", -1, server::command),
    reads("config", -2, server::config),
    reads("dbsize", 1, keys::dbsize),
    adds("decr", 2, strings::decr),
    adds("decrby", 3, strings::decrby),
    reads("del", -2, keys::del),
    reads("echo", 2, server::echo),
    reads("exists", -2, keys::exists),
    reads("expire", -3, keys::expire),
    reads("flushall", -1, keys::flushall),
    reads("flushdb", -1, keys::flushall),
    reads("get", 2, strings::get),
    reads("getdel", 2, strings::getdel),
    adds("getset", 3, strings::getset),
    reads("hello", -1, server::hello),
    adds("incr", 2, strings::incr),
    adds("incrby", 3, strings::incrby),
    reads("info", -1, server::info),
    reads("keys", 2, keys::keys),
    reads("llen", 2, lists::llen),
    reads("lpop", -2, lists::lpop),
    adds("lpush", -3, lists::lpush),
    reads("lrange", 4, lists::lrange),
    reads("mget", -2, strings::mget),
    adds("mset", -3, strings::mset),
    reads("persist", 2, keys::persist),
    reads("pexpire", -3, keys::pexpire),
    reads("ping", -1, server::ping),
    adds("psetex", 4, strings::psetex),
    reads("pttl", 2, keys::pttl),
    reads("quit", -1, server::quit),
    reads("randomkey", 1, keys::randomkey),
    reads("reset", 1, server::reset),
    reads("rpop", -2, lists::rpop),
    adds("rpush", -3, lists::rpush),
    adds("sadd", -3, sets::sadd),
    reads("scard", 2, sets::scard),
    reads("select", 2, server::select),
    adds("set", -3, strings::set),
    adds("setex", 4, strings::setex),
    adds("setnx", 3, strings::setnx),
    reads("sismember", 3, sets::sismember),
    reads("smembers", 2, sets::smembers),
    reads("spop", -2, sets::spop),
    reads("srandmember", 2, sets::srandmember),
    reads("srem", -3, sets::srem),
    reads("strlen", 2, strings::strlen),
    reads("time", 1, server::time),
    reads("touch", -2, keys::exists),
    reads("ttl", 2, keys::ttl),
    reads("type", 2, keys::type_of),
    reads("unlink", -2, keys::del),
];

/// Number of commands.
pub(super) fn count() -> usize {
    COMMANDS.len()
}

/// Executes one command (at least its name) and appends the reply.
pub(crate) fn execute(args: Args<'_>, world: &mut World, out: &mut Vec<u8>) -> After {
    let Some(command) = find(args.get(0)) else {
        unknown(args, out);
        return After::Continue;
    };
    let count = args.len() as i32;
    let now_ms = world.wall_ms();
    let outcome = if count < command.arity.abs() || (command.arity > 0 && count > command.arity) {
        Err(Refusal::Arity(command.name))
    } else if command.adds && world.store.is_full(now_ms) {
        Err(Refusal::OutOfMemory)
    } else {
        (command.run)(&mut Call {
            args,
            world,
            out,
            now_ms,
        })
    };
    if let Err(refusal) = outcome {
        refusal.write(out);
    }
    if command.name == "quit" {
        After::Close
    } else {
        After::Continue
    }
}

fn find(name: &[u8]) -> Option<&'static Command> {
    let mut lower = [0; 16];
    let lower = lower.get_mut(..name.len())?;
    lower.copy_from_slice(name);
    lower.make_ascii_lowercase();
    let index = COMMANDS
        .binary_search_by(|command| command.name.as_bytes().cmp(lower))
        .ok()?;
    Some(&COMMANDS[index])
}

fn unknown(args: Args<'_>, out: &mut Vec<u8>) {
    let mut quoted = Vec::new();
    for arg in args.from(1) {
        if quoted.len() >= QUOTED_MAX {
            break;
        }
        let room = QUOTED_MAX - quoted.len();
        quoted.push(b'\'');
        quoted.extend_from_slice(&arg[..arg.len().min(room)]);
        quoted.extend_from_slice(b"' ");
    }
    let name = args.get(0);
    let name = &name[..name.len().min(QUOTED_MAX)];
    let middle = b"', with args beginning with: ";
    reply::error(out, &[b"ERR unknown command '", name, middle, &quoted]);
}

/// The error of a container command such as `CONFIG` for a subcommand that is not there.
pub(super) fn unknown_subcommand(call: &mut Call<'_>, container: &str) -> Outcome {
    let name = call.arg(1);
    let name = &name[..name.len().min(QUOTED_MAX)];
    let parts = [
        b"ERR unknown subcommand '",
        name,
        b"'. Try ",
        container.as_bytes(),
        b" HELP.",
    ];
    reply::error(call.out, &parts);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
    }
}
