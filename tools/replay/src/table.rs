//! A report for people.
//!
//! Invariant: lines are at most 100 columns wide, but for long flow names.

use std::fmt::Write as _;

use crate::report::{FlowRow, Found, Report};
use crate::view::ROW_BYTES;

/// Rows of the table of flows; the rest is added up in one.
const ROWS_MAX: usize = 40;
/// Divergences that are shown with their bytes.
const SHOWN_MAX: usize = 10;

/// The report as text.
pub fn table(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    write_flows(&mut text, report).ok();
    write_divergences(&mut text, report).ok();
    write_sums(&mut text, report).ok();
    text
}

/// Diverged flows first, then those with most packets.
fn write_flows(text: &mut String, report: &Report) -> std::fmt::Result {
    let mut rows: Vec<_> = report.flow_table.iter().collect();
    rows.sort_by_key(|row| std::cmp::Reverse((row.divergences, row.primary.packets)));
    let shown = rows.len().min(ROWS_MAX);
    let (shown, rest) = rows.split_at(shown);
    let mut others = report.other_flows.clone().unwrap_or_default();
    rest.iter().for_each(|row| others.add(row));
    others.flow = format!("{} others", report.flows - shown.len() as u64);
    let others = (report.flows > shown.len() as u64).then_some(&others);
    let name = |row: &&FlowRow| row.flow.chars().count();
    let width = shown.iter().copied().chain(others);
    let width = width.map(|row| name(&row)).max().unwrap_or(4).max(4);
    writeln!(
        text,
        "{:width$} {:>8} {:>11} {:>8} {:>11} {:>8} {:>8}  verdict",
        "flow", "PVM pkts", "bytes", "SVM pkts", "bytes", "released", "held"
    )?;
    for row in shown.iter().copied().chain(others) {
        writeln!(
            text,
            "{:width$} {:>8} {:>11} {:>8} {:>11} {:>8} {:>8}  {}",
            row.flow,
            row.primary.packets,
            row.primary.bytes,
            row.secondary.packets,
            row.secondary.bytes,
            row.released,
            row.held,
            verdict(row)
        )?;
    }
    Ok(())
}

fn verdict(row: &FlowRow) -> String {
    match (row.cause, row.divergences) {
        (Some(cause), 1) => format!("diverged: {cause}"),
        (Some(cause), times) => format!("diverged {times} times, first: {cause}"),
        (None, _) if row.held > 0 => "held by other flows or the policy".to_owned(),
        (None, _) => "same".to_owned(),
    }
}

fn write_divergences(text: &mut String, report: &Report) -> std::fmt::Result {
    for found in report.divergences.iter().take(SHOWN_MAX) {
        writeln!(text)?;
        write_divergence(text, found)?;
    }
    let listed = report.divergences.len() as u64 + report.divergences_omitted;
    let more = listed.saturating_sub(SHOWN_MAX as u64);
    if more > 0 {
        writeln!(text, "\nand {more} more divergences (--json lists them)")?;
    }
    Ok(())
}

fn write_divergence(text: &mut String, found: &Found) -> std::fmt::Result {
    let at_s = found.at_us as f64 / 1e6;
    write!(text, "{at_s:.6} s  {}", found.cause)?;
    if let Some(flow) = &found.flow {
        write!(text, "  {flow}")?;
    }
    writeln!(text, "  at byte {}", found.offset)?;
    let side = |name: &str, frame: Option<u64>| match frame {
        Some(number) => format!("{name}, frame {number}"),
        None => format!("{name}, nothing"),
    };
    let column = ROW_BYTES * 4 + 1;
    writeln!(
        text,
        "        {:column$}    {}",
        side("PVM", found.primary.frame),
        side("SVM", found.secondary.frame)
    )?;
    let (a, b) = (&found.primary.bytes, &found.secondary.bytes);
    for at in (0..a.len().max(b.len())).step_by(ROW_BYTES) {
        let row = |bytes: &[u8]| {
            let end = bytes.len().min(at + ROW_BYTES);
            bytes.get(at..end).unwrap_or_default().to_vec()
        };
        write_row(text, found.view_at as usize + at, &row(a), &row(b))?;
    }
    Ok(())
}

/// Both sides, and a line below that marks where they differ.
fn write_row(text: &mut String, at: usize, a: &[u8], b: &[u8]) -> std::fmt::Result {
    writeln!(text, "  {at:5} {}    {}", hex_and_text(a), hex_and_text(b))?;
    let differs = |n: usize| a.get(n) != b.get(n);
    if !(0..ROW_BYTES).any(differs) {
        return Ok(());
    }
    let mark = |bytes: &[u8]| -> String {
        let marked = |n: usize| n < bytes.len() && differs(n);
        let hex = (0..ROW_BYTES).map(|n| if marked(n) { "^^ " } else { "   " });
        let text = (0..ROW_BYTES).map(|n| if marked(n) { "^" } else { " " });
        hex.chain([" "]).chain(text).collect()
    };
    let marks = format!("        {}    {}", mark(a), mark(b));
    writeln!(text, "{}", marks.trim_end())
}

fn hex_and_text(bytes: &[u8]) -> String {
    let mut line = String::new();
    for n in 0..ROW_BYTES {
        match bytes.get(n) {
            Some(byte) => write!(line, "{byte:02x} ").ok(),
            None => write!(line, "   ").ok(),
        };
    }
    line.push(' ');
    for n in 0..ROW_BYTES {
        let printable = |byte: &u8| (b' '..=b'~').contains(byte);
        line.push(match bytes.get(n) {
            Some(byte) if printable(byte) => char::from(*byte),
            Some(_) => '.',
            None => ' ',
        });
    }
    line
}

fn write_sums(text: &mut String, report: &Report) -> std::fmt::Result {
    writeln!(text)?;
    writeln!(
        text,
        "{} compared, {} released at once, {} held, {} of the SVM dropped",
        report.pairs, report.released, report.held, report.dropped
    )?;
    let divergences = report.divergences.len() as u64 + report.divergences_omitted;
    writeln!(
        text,
        "{} in {} flows, {}",
        counted(divergences, "divergence"),
        report.flows,
        counted(report.checkpoints, "checkpoint")
    )?;
    let input = report.primary_input.packets;
    write!(text, "guest {}, {input} frames of input", report.guest_mac)?;
    if report.foreign.packets > 0 {
        let foreign = report.foreign.packets;
        write!(text, ", {foreign} frames of others left out")?;
    }
    if report.clock_shift_ns != 0 {
        let shift_s = report.clock_shift_ns as f64 / 1e9;
        write!(text, ", times of the secondary moved by {shift_s:.6} s")?;
    }
    writeln!(text)
}

fn counted(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}
