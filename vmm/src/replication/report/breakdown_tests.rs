//! Every part of a checkpoint has a number of its own here, so that none can stand for another.

use std::collections::BTreeMap;

use colo_fastpath::link::LinkStats;
use colo_fastpath::pair::{PrimaryReport, SecondaryReport};
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::stage::{ApplyCost, ApplyParts};
use crate::replication::applied::ApplyTimes;

/// The keys of a document that have percentiles of something measured. Of one value all three are that value.
fn measured(status: &PairStatus) -> BTreeMap<String, u64> {
    let document = serde_json::to_value(status).unwrap();
    let mut found = BTreeMap::new();
    for (key, value) in document.as_object().unwrap() {
        let Some(max) = value["max"].as_u64().filter(|&max| max > 0) else {
            continue;
        };
        assert_eq!(value, &json!({"p50": max, "p99": max, "max": max}), "{key}");
        found.insert(key.clone(), max);
    }
    found
}

fn expected(keys: &[(&str, u64)]) -> BTreeMap<String, u64> {
    keys.iter().map(|&(k, n)| (k.to_owned(), n)).collect()
}

#[test]
fn rule_17_the_primary_tells_every_part_of_a_checkpoint_by_its_name() {
    let mut times = CheckpointTimes::default();
    times.begun(7, "payload");
    times.svm_stopped(101);
    times.captured(&CaptureCost {
        early_us: 26,
        early_pages: 27,
        late_pages: 28,
        again_pages: 29,
        pause_us: 300,
        quiesce_us: 11,
        state_us: 12,
        collect_us: 13,
        stabilise_us: 14,
        audit_us: 15,
        resume_us: 16,
        dirty_pages: 900,
        ahead_pages: 17,
        pending_frames: 18,
    });
    let mut sent = Sent {
        transfer_us: 500,
        begin_us: 30,
        hand_over_us: 31,
        digest_wait_us: 19,
        sent_bytes: 20,
        digest_bytes: 21,
        digested_pages: 22,
        ..Sent::default()
    };
    sent.pages.equal = 23;
    sent.names.used_pages = 24;
    sent.names.equal_pages = 25;
    times.sent(7, &sent, 40);
    times.committed(1_100, 1_200);

    let mut hold_us = Histogram::new_with_bounds(1, 10_000, 3).unwrap();
    hold_us.record(1_300).unwrap();
    let report = PrimaryReport {
        stats: Default::default(),
        hold_us,
        link: LinkStats::default(),
    };
    let status = PairStatus::of_primary(Standing::default(), &report, &times);
    let mut last = serde_json::to_value(&status).unwrap()["last_checkpoint"].take();
    let mut take = |key: &str| last.as_object_mut().unwrap().remove(key).unwrap();
    let (pages, ahead) = (take("pages"), take("ahead"));
    assert_eq!(pages["equal"], 23);
    let named = [&ahead["used_pages"], &ahead["equal_pages"]];
    assert_eq!(named, [&Value::from(24), &Value::from(25)]);
    let parts = json!({
        "epoch": 7, "cause": "payload",
        "svm_stop_us": 101, "early_us": 26, "early_pages": 27, "late_pages": 28, "again_pages": 29, "pause_us": 300, "quiesce_us": 11, "state_us": 12, "collect_us": 13,
        "stabilise_us": 14, "audit_us": 15, "resume_us": 16, "stall_us": 40, "stolen_us": 340,
        "transfer_us": 500, "begin_us": 30, "hand_over_us": 31, "digest_wait_us": 19, "commit_us": 1_100, "hold_us": 1_200,
        "dirty_pages": 900, "ahead_pages": 17, "pending_frames": 18,
        "sent_bytes": 20, "digest_bytes": 21, "digested_pages": 22,
    });
    assert_eq!(last, parts);

    let spreads = [
        ("checkpoint_pause_us", 300),
        ("quiesce_us", 11),
        ("state_us", 12),
        ("early_us", 26),
        ("collect_us", 13),
        ("stabilise_us", 14),
        ("audit_us", 15),
        ("resume_us", 16),
        ("stall_us", 40),
        ("stolen_us", 340),
        ("svm_stop_us", 101),
        ("transfer_us", 500),
        ("begin_us", 30),
        ("hand_over_us", 31),
        ("digest_wait_us", 19),
        ("commit_us", 1_100),
        ("hold_us", 1_300),
        ("dirty_pages", 900),
    ];
    assert_eq!(measured(&status), expected(&spreads));
}

#[test]
fn rule_17_the_secondary_tells_every_part_of_a_checkpoint_by_its_name() {
    let mut times = ApplyTimes::default();
    times.applied(
        7,
        &ApplyCost {
            parts: ApplyParts {
                stage_us: 31,
                apply_us: 32,
                write_us: 33,
                load_us: 34,
                audit_us: 35,
                resume_us: 36,
                pages: 37,
            },
            ..ApplyCost::default()
        },
    );
    let report = SecondaryReport {
        stats: Default::default(),
        link: LinkStats::default(),
    };
    let status = PairStatus::of_secondary(Standing::default(), &report, &times);
    let last = serde_json::to_value(&status).unwrap()["last_checkpoint"].take();
    let parts = json!({
        "epoch": 7, "stage_us": 31, "apply_us": 32, "write_us": 33, "load_us": 34, "audit_us": 35,
        "resume_us": 36, "pages": 37,
    });
    assert_eq!(last, parts);
    let spreads = [
        ("stage_us", 31),
        ("apply_us", 32),
        ("write_us", 33),
        ("load_us", 34),
        ("audit_us", 35),
        ("resume_us", 36),
    ];
    assert_eq!(measured(&status), expected(&spreads));
}

#[test]
fn rule_17_checkpoints_without_an_audit_do_not_count_as_short_audits() {
    let mut times = CheckpointTimes::default();
    for (epoch, audit_us) in [(1, 0), (2, 70)] {
        times.begun(epoch, "periodic");
        times.captured(&CaptureCost {
            audit_us,
            ..CaptureCost::default()
        });
        times.sent(epoch, &Sent::default(), 0);
        times.committed(1, 0);
    }
    assert_eq!(times.audit_us.percentiles().p50, 70);
    assert_eq!((times.count, times.audit_us.count()), (2, 1));
}
