//! What a load must have seen when it is over.

use colo_lab::load::LoadReport;

/// No error, and no wrong answer.
#[track_caller]
pub fn assert_right(report: &LoadReport) {
    let wrong = (report.client_errors, report.wrong_responses);
    assert_eq!(wrong, (0, 0), "{:#?}", report.notes);
}

/// That, and no connection lost of those that were open when a host was killed.
#[track_caller]
pub fn assert_survived(report: &LoadReport) {
    assert_right(report);
    let survival = report.survival.expect("a kill was marked");
    assert!(survival.connections_before > 0, "{survival:?}");
    assert_eq!(survival.connections_lost, 0, "{:#?}", report.notes);
}
