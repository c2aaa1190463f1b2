//! Random streams, cut and damaged at random: the replay finds exactly what was put there.

#![allow(clippy::unwrap_used, reason = "what fails in a rig fails its test")]

mod rig;

use colo_compare::testing::Side;
use colo_replay::capture;
use proptest::prelude::*;
use rig::*;

/// Answers of one connection and when they are given.
type Answers = Vec<(u64, Vec<u8>)>;

fn answers() -> impl Strategy<Value = Answers> {
    let answer = (1_000u64..8_000, 8usize..3000);
    (any::<u32>(), prop::collection::vec(answer, 1..12)).prop_map(|(seed, answers)| {
        let mut at_us = 0;
        let mut noise = seed;
        let mut given = Vec::new();
        for (gap_us, len) in answers {
            at_us += gap_us;
            // Unlike each other: where a stream goes on can be told only by its contents.
            let bytes = std::iter::repeat_with(|| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (noise >> 24) as u8
            });
            given.push((at_us, bytes.take(len).collect()));
        }
        given
    })
}

/// How one guest sends what it sends.
#[derive(Debug, Clone)]
struct Manner {
    isn: u32,
    skew_us: u64,
    segments: Vec<usize>,
    repeats: bool,
}

fn manner() -> impl Strategy<Value = Manner> {
    let segments = prop::collection::vec(60usize..1448, 1..6);
    (any::<u32>(), 0u64..15_000, segments, any::<bool>()).prop_map(
        |(isn, skew_us, segments, repeats)| Manner {
            isn,
            skew_us,
            segments,
            repeats,
        },
    )
}

fn frames(answers: &Answers, manner: &Manner) -> Frames {
    let mut connection = Connection::accepted(Side::V6, manner.isn, manner.skew_us);
    let mut segments = manner.segments.iter().cycle();
    for (at_us, bytes) in answers {
        connection.at(at_us + manner.skew_us);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let n = rest.len().min(*segments.next().unwrap());
            connection.send(&rest[..n], n);
            rest = &rest[n..];
        }
        if manner.repeats {
            connection.again(
                &bytes[bytes.len() / 2..],
                (bytes.len() - bytes.len() / 2) as u32,
            );
        }
        connection.ack();
    }
    connection.fin();
    connection.frames
}

proptest! {
    #[test]
    fn the_same_answers_are_the_same(
        answers in answers(),
        pvm in manner(),
        svm in manner(),
    ) {
        let report = compare(&frames(&answers, &pvm), &frames(&answers, &svm));
        prop_assert!(report.is_same(), "{report:#?}");
        prop_assert_eq!((report.held, report.dropped), (0, 0));
    }

    /// What goes on afterwards is the same again, so it is one divergence, however both are cut.
    #[test]
    fn one_byte_that_differs_is_one_divergence(
        answers in answers(),
        pvm in manner(),
        svm in manner(),
        place: (prop::sample::Index, prop::sample::Index),
        bit in 0u8..8,
    ) {
        let mut other = answers.clone();
        let answer = &mut other[place.0.index(answers.len())].1;
        let at = place.1.index(answer.len());
        answer[at] ^= 1 << bit;
        // A retransmission of it would be another divergence.
        let (pvm, svm) = (Manner { repeats: false, ..pvm }, Manner { repeats: false, ..svm });
        let report = compare(&frames(&answers, &pvm), &frames(&other, &svm));
        prop_assert_eq!(causes(&report), ["payload"], "{:#?}", report);
        let found = &report.divergences[0];
        let shown = (found.offset - found.view_at) as usize;
        let (a, b) = (found.primary.bytes[shown], found.secondary.bytes[shown]);
        prop_assert_eq!(a ^ b, 1 << bit);
    }

    /// Another answer of another length shifts the rest of the stream; it is found again.
    #[test]
    fn an_answer_of_another_length_is_found_and_the_rest_is_the_same(
        answers in answers(),
        pvm in manner(),
        svm in manner(),
        place: prop::sample::Index,
        len in 1usize..3000,
    ) {
        let n = place.index(answers.len());
        let mut other = answers.clone();
        // No byte is the same, and what is longer is not what comes next.
        let old = answers[n].1.iter().chain(std::iter::repeat(&0)).enumerate();
        other[n].1 = old.map(|(at, byte)| !byte ^ (at as u8 & 1)).take(len).collect();
        // A retransmission of it would be another divergence.
        let (pvm, svm) = (Manner { repeats: false, ..pvm }, Manner { repeats: false, ..svm });
        let report = compare(&frames(&answers, &pvm), &frames(&other, &svm));
        prop_assert_eq!(report.divergences[0].cause, "payload", "{:#?}", report);
        // The one that was put there, and perhaps one until the stream is found again.
        prop_assert!((1..=2).contains(&report.divergences.len()), "{:#?}", report);
    }

    #[test]
    fn damaged_captures_give_a_report_or_a_fault(
        answers in answers(),
        pvm in manner(),
        svm in manner(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        cut: prop::sample::Index,
    ) {
        let mut damaged = frames(&answers, &pvm).bytes(PCAP);
        for (at, byte) in changes {
            let at = at.index(damaged.len());
            damaged[at] = byte;
        }
        damaged.truncate(damaged.len() - cut.index(damaged.len()) / 8);
        let whole = frames(&answers, &svm).bytes(PCAP);
        for (a, b) in [(&damaged, &whole), (&whole, &damaged)] {
            let settings = colo_replay::Settings::default();
            let outcome = colo_replay::replay(a, b, &settings);
            let is_whole = capture::read(&damaged).and_then(|r| r.collect::<Result<Vec<_>, _>>());
            prop_assert_eq!(outcome.is_ok(), is_whole.is_ok());
            if let Ok(report) = outcome {
                prop_assert!(!colo_replay::table(&report).is_empty());
                let sent = report.flow_table.iter().map(|row| row.primary.packets).sum::<u64>();
                prop_assert_eq!(report.released + report.held, sent);
            }
        }
    }
}
