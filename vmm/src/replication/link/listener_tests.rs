//! Both sides of the link against each other, over loopback.

use super::*;
use crate::replication::link::{connect, connect_pages_again, preamble};

fn listener() -> (Listener, SocketAddr) {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), 4).unwrap();
    let address = listener.socket.as_ref().unwrap().local_addr().unwrap();
    (listener, address)
}

fn poll_until<T>(mut f: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "gave up waiting");
        std::thread::yield_now();
    }
}

#[test]
fn an_address_that_is_not_free_is_tried_until_it_is() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    assert!(Listener::bind(address, 4).is_err());
    let mut listener = Listener::bind_when_free(address, 4);
    assert!(listener.poll().is_none());
    assert!(listener.is_busy() && listener.fds().next().is_none());
    drop(taken);
    listener.tried = Instant::now().checked_sub(LISTEN_RETRY).unwrap();
    assert!(listener.poll().is_none());
    assert!(!listener.is_busy());
    TcpStream::connect(address).unwrap();
}

#[test]
fn channels_of_two_sessions_are_not_mixed() {
    let (mut listener, address) = listener();
    let mut ours = Vec::new();
    for (session, shards) in [(11u64, 1), (22, 3)] {
        let mut channels = connect(address, session, shards, 1).unwrap();
        for (shard, packets) in channels.packets.iter_mut().enumerate() {
            let name = session + shard as u64;
            packets.write_all(&name.to_le_bytes()).unwrap();
        }
        ours.push(channels);
    }
    for _ in 0..2 {
        let mut theirs = poll_until(|| listener.poll());
        let shards = if theirs.session == 11 { 1 } else { 3 };
        assert_eq!(theirs.packets.len(), shards);
        for (shard, packets) in theirs.packets.iter_mut().enumerate() {
            packets.set_nonblocking(false).unwrap();
            let mut bytes = [0; 8];
            packets.read_exact(&mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), theirs.session + shard as u64);
        }
    }
}

#[test]
fn garbage_is_counted_and_does_not_stop_others() {
    let (mut listener, address) = listener();
    let mut garbage = TcpStream::connect(address).unwrap();
    garbage.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    poll_until(|| {
        assert!(listener.poll().is_none());
        (listener.refused == 1).then_some(())
    });
    let _ours = connect(address, 5, 1, 1).unwrap();
    assert_eq!(poll_until(|| listener.poll()).session, 5);
}

/// Joins `listener` with three shards and so many streams at most; gives how many both sides have, in the same order.
fn joined(mut listener: Listener, address: SocketAddr, page_streams: usize) -> usize {
    let joining = std::thread::spawn(move || {
        let mut channels = connect(address, 7, 3, page_streams).unwrap();
        for (n, stream) in channels.pages.iter_mut().enumerate() {
            stream.write_all(&[n as u8]).unwrap();
        }
        channels
    });
    let mut theirs = poll_until(|| listener.poll());
    let ours = joining.join().unwrap();
    assert_eq!((ours.packets.len(), theirs.packets.len()), (3, 3));
    assert_eq!(ours.pages.len(), theirs.pages.len());
    for (n, stream) in theirs.pages.iter_mut().enumerate() {
        stream.set_nonblocking(false).unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(usize::from(byte[0]), n);
    }
    assert_eq!(listener.refused, 0);
    theirs.pages.len()
}

#[test]
fn pages_have_as_many_streams_as_both_hosts_take() {
    for (theirs, ours, both) in [(4, 4, 4), (4, 2, 2), (2, 8, 2), (1, 3, 1), (8, 1, 1)] {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), theirs).unwrap();
        let address = listener.socket.as_ref().unwrap().local_addr().unwrap();
        let found = joined(listener, address, ours);
        assert_eq!(found, both, "{theirs} and {ours}");
    }
}

#[test]
fn rule_22_a_primary_that_does_not_know_the_question_gets_what_it_knows() {
    let older = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = older.local_addr().unwrap();
    let joining = std::thread::spawn(move || connect(address, 7, 2, 4).unwrap());
    let preamble = || {
        let mut stream = older.accept().unwrap().0;
        let mut bytes = [0; PREAMBLE_LEN];
        stream.read_exact(&mut bytes).unwrap();
        (stream, bytes)
    };
    // It closes what is no channel of its.
    let (question, asked) = preamble();
    assert_eq!(asked[10], QUESTION);
    drop(question);
    for channel in 0..4 {
        let (_stream, bytes) = preamble();
        assert_eq!((bytes[10], bytes[11]), (channel, 1), "one more shard");
    }
    assert_eq!(joining.join().unwrap().pages.len(), 1);
}

#[test]
fn more_streams_than_were_granted_are_refused() {
    let (mut listener, address) = listener();
    for more in [0x40, 0xf0, 0x08] {
        let refused = listener.refused;
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&preamble(0, more, 9)).unwrap();
        poll_until(|| {
            assert!(listener.poll().is_none());
            (listener.refused == refused + 1).then_some(())
        });
    }
    let mut first = TcpStream::connect(address).unwrap();
    first.write_all(&preamble(0, 0x30, 9)).unwrap();
    poll_until(|| {
        assert!(listener.poll().is_none());
        (!listener.sessions.is_empty()).then_some(())
    });
    let mut other = TcpStream::connect(address).unwrap();
    other.write_all(&preamble(1, 0x20, 9)).unwrap();
    poll_until(|| {
        assert!(listener.poll().is_none());
        (listener.refused == 4).then_some(())
    });
}

#[test]
fn sessions_that_are_never_whole_are_not_kept_without_bound() {
    let (mut listener, address) = listener();
    let mut begin = |session: u64, channel: usize| {
        let (shards, page_streams) = (0, 0);
        let more = More {
            shards,
            page_streams,
        };
        let preamble = Preamble {
            channel,
            more,
            session,
        };
        listener.put_together(preamble, TcpStream::connect(address).unwrap());
        (listener.sessions.len(), listener.refused)
    };
    for session in 0..SESSIONS_MAX as u64 {
        assert_eq!(begin(session, 0), (session as usize + 1, 0));
    }
    assert_eq!(begin(99, 0), (SESSIONS_MAX, 1));
    // Those that began before go on.
    assert_eq!(begin(0, 1), (SESSIONS_MAX, 1));
}

#[test]
fn streams_of_pages_are_opened_anew_for_the_session_that_asks() {
    let (mut listener, address) = listener();
    let joining = std::thread::spawn(move || connect_pages_again(address, 7, 3).unwrap());
    let mut theirs = poll_until(|| {
        // It joins nobody, and another session's are not ours.
        assert!(listener.poll().is_none() && listener.take_pages(8).is_none());
        listener.take_pages(7)
    });
    let mut ours = joining.join().unwrap();
    assert_eq!((ours.len(), theirs.len()), (3, 3));
    for (n, (ours, theirs)) in ours.iter_mut().zip(&mut theirs).enumerate() {
        ours.write_all(&[n as u8]).unwrap();
        theirs.set_nonblocking(false).unwrap();
        let mut byte = [9];
        theirs.read_exact(&mut byte).unwrap();
        assert_eq!(usize::from(byte[0]), n, "nothing is left of the answer");
    }
    assert!(listener.take_pages(7).is_none() && !listener.is_busy());
}

#[test]
fn rule_22_a_primary_that_does_not_open_streams_anew_is_noticed() {
    let older = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = older.local_addr().unwrap();
    let asking = std::thread::spawn(move || connect_pages_again(address, 7, 2));
    for _ in 0..2 {
        drop(older.accept().unwrap());
    }
    assert!(asking.join().unwrap().is_err());
}

#[test]
fn a_used_address_is_named() {
    let (_listener, address) = listener();
    let e = Listener::bind(address, 1).unwrap_err().to_string();
    assert!(
        e.contains("link_listen") && e.contains(&address.to_string()),
        "{e}"
    );
}
