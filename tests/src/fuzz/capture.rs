//! Targets `capture` and `replay`: packet captures of any bytes.
//!
//! Input of `capture`: a file. Checked: no panic; frames are slices of the file, in its order, of
//! lengths that can be; times are sorted afterwards; nothing follows a fault, and a fault tells a
//! place within the file.
//! Input of `replay`: two bytes, the length of the first capture, then both captures; a length of
//! zero: the same capture twice. Checked: no panic, and every frame is accounted for.

use std::ops::Range;

use colo_replay::capture::{FRAME_MAX, FRAME_MIN, Fault, Record, Sorted, read};
use colo_replay::{Settings, replay as replay_both};

use super::bytes::Bytes;

/// The body of the target `capture`.
pub fn capture(input: &[u8]) {
    let file = input.as_ptr_range();
    let mut frames = 0;
    let mut fault = None;
    match read(input) {
        Err(found) => fault = Some(found),
        Ok(mut reader) => {
            let mut offset = None;
            while let Some(next) = reader.next() {
                match next {
                    Ok(record) => {
                        frames += 1;
                        check_record(&record, &file, frames);
                        assert!(Some(record.offset) > offset, "in the order of the file");
                        offset = Some(record.offset);
                    }
                    Err(found) => {
                        fault = Some(found);
                        assert!(reader.next().is_none(), "something follows a fault");
                    }
                }
            }
        }
    }
    if let Some(fault) = &fault {
        check_fault(fault, input.len());
    }
    check_sorted(input, frames, fault.is_some());
}

fn check_record(record: &Record<'_>, file: &Range<*const u8>, number: u64) {
    assert_eq!(record.number, number);
    let len = record.frame.len() as u32;
    assert!((FRAME_MIN..=FRAME_MAX).contains(&len));
    let frame = record.frame.as_ptr_range();
    assert!(file.start <= frame.start && frame.end <= file.end);
    let place = frame.start as usize - file.start as usize;
    assert!(
        record.offset < place as u64,
        "a record begins before its frame"
    );
}

fn check_fault(fault: &Fault, len: usize) {
    assert!(fault.offset <= len as u64, "{fault} in a file of {len}");
    assert!(fault.to_string().starts_with("byte "));
}

fn check_sorted(input: &[u8], frames: u64, has_fault: bool) {
    let Ok(reader) = read(input) else { return };
    let mut sorted = Sorted::new(reader);
    let (mut last_ns, mut count) = (0, 0);
    loop {
        match sorted.next_record() {
            Ok(Some(record)) => {
                assert!(record.at_ns >= last_ns, "time went back");
                last_ns = record.at_ns;
                count += 1;
            }
            Ok(None) => break,
            Err(_) => {
                assert!(has_fault);
                return;
            }
        }
    }
    assert!(!has_fault && count == frames, "{count} of {frames} frames");
}

/// The body of the target `replay`.
pub fn replay(input: &[u8]) {
    let mut bytes = Bytes::new(input);
    let first_len = usize::from(bytes.u16());
    let first = bytes.take(first_len);
    let second = bytes.rest();
    let first = if first_len == 0 { second } else { first };
    let Ok(report) = replay_both(first, second, &Settings::default()) else {
        return;
    };
    assert!(!colo_replay::table(&report).is_empty());
    let rows = report.flow_table.iter().chain(&report.other_flows);
    let (sent, decided) = rows.fold((0, 0), |(sent, decided), row| {
        let row_decided = row.released + row.held;
        (sent + row.primary.packets, decided + row_decided)
    });
    assert_eq!(
        (sent, decided),
        (report.primary_output(), report.primary_output())
    );
    assert!(
        report.primary_output() <= records(first) && report.flows >= report.flow_table.len() as u64
    );
}

fn records(file: &[u8]) -> u64 {
    let reader = read(file).into_iter().flatten();
    reader.filter(|record| record.is_ok()).count() as u64
}
