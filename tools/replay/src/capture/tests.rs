use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::testing::{FORMATS, Format, Writer, capture};

const PCAP: Format = Format::Pcap {
    nanoseconds: false,
    big_endian: false,
};
const PCAPNG: Format = Format::Pcapng {
    resolution: Some(9),
    big_endian: false,
};

fn frames() -> Vec<(u64, Vec<u8>)> {
    let second = 1_700_000_000_000_000_000;
    let times = [0, 1_500, 1_000_000_007, 3_999_999_999];
    let lengths = [14, 60, 61, 1514];
    let frame = |len: usize| (0..len).map(|n| n as u8).collect();
    let frames = times.iter().zip(lengths);
    frames
        .map(|(at_ns, len)| (second + at_ns, frame(len)))
        .collect()
}

fn records(bytes: &[u8]) -> Result<Vec<Record<'_>>, Fault> {
    read(bytes)?.collect()
}

fn problem(bytes: &[u8]) -> Problem {
    records(bytes).unwrap_err().problem
}

#[test]
fn every_format_gives_the_same_frames_and_times() {
    for format in FORMATS {
        let bytes = capture(format, &frames());
        let read = records(&bytes).unwrap();
        assert_eq!(read.len(), 4, "{format:?}");
        for (n, (record, (at_ns, frame))) in read.iter().zip(frames()).enumerate() {
            assert_eq!(record.number, n as u64 + 1);
            assert_eq!(record.frame, frame);
            let resolution_ns = match format {
                Format::Pcap {
                    nanoseconds: true, ..
                }
                | Format::Pcapng {
                    resolution: Some(9 | 10),
                    ..
                } => 1,
                _ => 1000,
            };
            let error_ns = at_ns - record.at_ns;
            assert!(error_ns < resolution_ns, "{format:?}: {error_ns} ns");
        }
    }
}

/// A capture that stops at the end of a record is whole; everywhere else it is cut off.
#[test]
fn a_file_that_is_cut_off_says_where() {
    for format in FORMATS {
        let whole = capture(format, &frames());
        let mut ends = BTreeSet::from([whole.len()]);
        ends.extend(records(&whole).unwrap().iter().map(|r| r.offset as usize));
        if let Format::Pcapng { .. } = format {
            // After the section header.
            ends.insert(28);
        }
        for end in 0..=whole.len() {
            let outcome = records(&whole[..end]);
            match outcome {
                Ok(records) => {
                    assert!(ends.contains(&end), "{format:?}: {end} bytes are enough");
                    assert!(records.iter().zip(frames()).all(|(r, f)| r.frame == f.1));
                }
                Err(fault) => {
                    assert!(!ends.contains(&end), "{format:?}: {end} bytes: {fault}");
                    assert!(fault.offset <= end as u64);
                    let known = matches!(fault.problem, Problem::Truncated { .. });
                    assert!(known || end < 4, "{format:?}: {end} bytes: {fault}");
                }
            }
        }
    }
}

#[test]
fn nothing_follows_a_fault() {
    let bytes = capture(PCAP, &frames());
    let mut reader = read(&bytes[..bytes.len() - 1]).unwrap();
    let outcomes: Vec<bool> = reader.by_ref().map(|record| record.is_ok()).collect();
    assert_eq!(outcomes, [true, true, true, false]);
    assert!(reader.next().is_none());
}

#[test]
fn what_is_no_capture_is_refused() {
    for (bytes, advice) in [
        (&b""[..], "empty"),
        (b"\xa1\xb2", "a1 b2"),
        (b"\x7fELF and more", "7f 45 4c 46"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ] {
        let fault = records(bytes).unwrap_err();
        assert!(matches!(fault.problem, Problem::NotACapture { .. }));
        assert!(fault.to_string().contains(advice), "{fault}");
    }
}

#[test]
fn what_cannot_be_replayed_is_refused_with_its_place() {
    let frame = [0; 60];
    let mut cut = Writer::new(false);
    cut.pcap_header(false, 1)
        .pcap_record((0, 0), 60, &frame)
        .pcap_record((0, 0), 1514, &frame);
    let fault = records(&cut.bytes).unwrap_err();
    assert_eq!(fault.offset, 24 + 16 + 60);
    let expected = Problem::Cut {
        captured: 60,
        original: 1514,
    };
    assert_eq!(fault.problem, expected);
    let text = fault.to_string();
    assert!(
        text.contains("byte 100") && text.contains("tcpdump -s 0"),
        "{text}"
    );

    let mut cooked = Writer::new(true);
    cooked.pcap_header(true, 113);
    let expected = Problem::NotEthernet { link_type: 113 };
    assert_eq!(problem(&cooked.bytes), expected);

    let mut short = Writer::new(true);
    short
        .pcap_header(true, 1)
        .pcap_record((0, 0), 13, &frame[..13]);
    assert!(matches!(problem(&short.bytes), Problem::Damaged { .. }));

    let mut old = Writer::new(false);
    old.u32(0xa1b2_c3d4).u16(1).u16(0);
    old.bytes.resize(24, 0);
    let expected = Problem::Version { major: 1, minor: 0 };
    assert_eq!(problem(&old.bytes), expected);

    // A host that crashed leaves zeros at the end.
    let mut zeros = capture(PCAP, &frames());
    zeros.resize(zeros.len() + 4096, 0);
    assert!(matches!(problem(&zeros), Problem::Damaged { .. }));

    let mut lengths = Writer::new(false);
    lengths
        .pcap_header(false, 1)
        .u32(0)
        .u32(0)
        .u32(u32::MAX)
        .u32(u32::MAX);
    assert!(matches!(problem(&lengths.bytes), Problem::Damaged { .. }));
}

#[test]
fn blocks_of_pcapng_that_cannot_be_are_refused() {
    let frame = [0; 60];
    let with = |fill: &dyn Fn(&mut Writer)| {
        let mut writer = Writer::new(false);
        writer.section();
        fill(&mut writer);
        problem(&writer.bytes)
    };
    let no_interface = Problem::NoInterface { interface: 0 };
    let unknown = with(&|writer| {
        writer.packet(0, 0, 60, &frame);
    });
    assert_eq!(unknown, no_interface);
    let cut = with(&|writer| {
        writer.interface(1, None).packet(0, 0, 61, &frame);
    });
    assert!(matches!(cut, Problem::Cut { .. }));
    let cooked = with(&|writer| {
        writer.interface(276, None).packet(0, 0, 60, &frame);
    });
    assert_eq!(cooked, Problem::NotEthernet { link_type: 276 });
    let simple = with(&|writer| {
        writer.interface(1, None).block(3, &[60, 0, 0, 0]);
    });
    assert_eq!(simple, Problem::NoTime);
    let tiny = with(&|writer| {
        writer.block(6, &[0; 8]);
    });
    assert!(matches!(tiny, Problem::Damaged { .. }));
    let odd = with(&|writer| {
        writer.u32(7).u32(13);
    });
    assert!(matches!(odd, Problem::Damaged { .. }));
    let tail = with(&|writer| {
        writer.u32(7).u32(12).u32(16);
    });
    assert!(matches!(tail, Problem::Damaged { .. }));
    let beyond = with(&|writer| {
        writer.interface(1, None);
        let mut body = vec![0; 20];
        body[12] = 60;
        body[16] = 60;
        writer.block(6, &body);
    });
    assert!(matches!(beyond, Problem::Damaged { .. }));
    let magic = with(&|writer| {
        writer.u32(0x0a0d_0d0a).u32(28).u32(0x1111_1111);
    });
    assert!(matches!(magic, Problem::Damaged { .. }));
}

#[test]
fn an_interface_that_is_not_used_may_be_of_any_kind() {
    let mut writer = Writer::new(false);
    writer.section().interface(113, None).interface(1, None);
    // Name resolution, statistics and a custom block in between.
    writer
        .block(4, &[0; 4])
        .block(5, &[0; 12])
        .block(0xbad, &[1, 2, 3]);
    writer.packet(1, 7, 60, &[0; 60]);
    let read = records(&writer.bytes).unwrap();
    assert_eq!((read.len(), read[0].at_ns), (1, 7000));
}

#[test]
fn a_new_section_has_its_own_byte_order_and_interfaces() {
    let mut little = Writer::new(false);
    little
        .section()
        .interface(1, Some(9))
        .packet(0, 5, 60, &[0; 60]);
    let mut big = Writer::new(true);
    big.section().interface(1, None).packet(0, 5, 60, &[0; 60]);
    let both = [little.bytes.clone(), big.bytes].concat();
    let times: Vec<_> = records(&both).unwrap().iter().map(|r| r.at_ns).collect();
    assert_eq!(times, [5, 5000]);
    let mut forgotten = Writer::new(true);
    forgotten.section().packet(0, 5, 60, &[0; 60]);
    let both = [little.bytes, forgotten.bytes].concat();
    assert_eq!(problem(&both), Problem::NoInterface { interface: 0 });
}

#[test]
fn obsolete_packet_blocks_are_read() {
    let mut writer = Writer::new(false);
    writer.section().interface(1, None);
    let mut body = Writer::new(false);
    body.u16(0).u16(9).u32(0).u32(8).u32(60).u32(60);
    body.bytes.extend_from_slice(&[3; 60]);
    writer.block(2, &body.bytes);
    let read = records(&writer.bytes).unwrap();
    assert_eq!((read[0].at_ns, read[0].frame), (8000, &[3; 60][..]));
}

#[test]
fn times_outside_of_what_clocks_have_are_clamped() {
    let mut writer = Writer::new(false);
    writer.section();
    let mut options = Writer::new(false);
    options.u16(1).u16(0).u32(0);
    options.u16(14).u16(8).u32(5).u32(0).u16(0).u16(0);
    writer.block(1, &options.bytes);
    let mut before = Writer::new(false);
    before.u16(1).u16(0).u32(0);
    before.u16(14).u16(8).u32(0).u32(0x8000_0000).u16(0).u16(0);
    writer.block(1, &before.bytes);
    for resolution in [0, 60, 127, 0xff] {
        writer.interface(1, Some(resolution));
    }
    for interface in 0..6 {
        writer.packet(interface, u64::MAX, 60, &[0; 60]);
    }
    writer.packet(0, 1, 60, &[0; 60]);
    let read = records(&writer.bytes).unwrap();
    let times: Vec<_> = read.iter().map(|record| record.at_ns).collect();
    let all = u64::MAX;
    assert_eq!(times, [all, 0, all, 0, 0, 0, 5_000_001_000]);
}

#[test]
fn frames_come_in_the_order_of_their_times() {
    let at = |at_ns: u64| (at_ns, vec![0; 60]);
    let bytes = capture(PCAPNG, &[at(5), at(3), at(9), at(3), at(7)]);
    let mut sorted = Sorted::new(read(&bytes).unwrap());
    let mut order = Vec::new();
    while let Some(record) = sorted.next_record().unwrap() {
        order.push((record.at_ns, record.number));
    }
    assert_eq!(order, [(3, 2), (3, 4), (5, 1), (7, 5), (9, 3)]);
    assert_eq!(sorted.late(), 0);
}

#[test]
fn a_frame_that_is_later_than_the_window_keeps_its_place() {
    let mut frames: Vec<_> = (0..2 * SORT_WINDOW as u64)
        .map(|n| (1000 + n, vec![0; 14]))
        .collect();
    frames.push((1, vec![1; 14]));
    let bytes = capture(PCAPNG, &frames);
    let mut sorted = Sorted::new(read(&bytes).unwrap());
    let mut last = 0;
    let mut n = 0;
    while let Some(record) = sorted.next_record().unwrap() {
        assert!(record.at_ns >= last);
        last = record.at_ns;
        n += 1;
    }
    assert_eq!((n, sorted.late()), (frames.len(), 1));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(
        format in 0..FORMATS.len(),
        cut in 0usize..2000,
        changes in prop::collection::vec((0usize..2000, any::<u8>()), 0..6),
    ) {
        let mut bytes = capture(FORMATS[format], &frames());
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        bytes.truncate(cut);
        let mut last = 0;
        for record in read(&bytes).into_iter().flatten() {
            match record {
                Ok(record) => {
                    prop_assert!(record.offset >= last);
                    prop_assert!(record.frame.len() <= bytes.len());
                    last = record.offset;
                }
                Err(fault) => prop_assert!(!fault.to_string().is_empty()),
            }
        }
    }

    #[test]
    fn noise_is_read_or_refused(kind in 0usize..4, noise: Vec<u8>) {
        let mut bytes = match kind {
            0 => Vec::new(),
            1 => Writer::new(false).section().interface(1, None).bytes.clone(),
            2 => Writer::new(true).section().interface(1, None).bytes.clone(),
            _ => Writer::new(true).pcap_header(true, 1).bytes.clone(),
        };
        bytes.extend(noise);
        let _ = records(&bytes);
    }
}
