//! `colo status`: asks a running machine and shows the answer to a person or a program.

use std::path::Path;
use std::process::ExitCode;

use colo_fastpath::stages::hgrm;
use colo_vmm::status::ask;
use serde_json::Value;
use tracing::error;

/// Prints the status behind a socket, or writes its distributions into a directory.
pub(crate) fn show(socket: &Path, json: bool, hgrm_dir: Option<&Path>) -> ExitCode {
    match (ask(socket), hgrm_dir) {
        (Ok(document), Some(dir)) => write_hgrm(&document, dir),
        (Ok(document), None) if json => {
            println!("{document:#}");
            ExitCode::SUCCESS
        }
        (Ok(document), None) => {
            print!("{}", table(&document));
            ExitCode::SUCCESS
        }
        (Err(e), _) => {
            error!("{e}; is the machine running?");
            ExitCode::FAILURE
        }
    }
}

/// One `.hgrm` file a stage, in microseconds.
fn write_hgrm(document: &Value, dir: &Path) -> ExitCode {
    let stages = document.get("stages").and_then(Value::as_array);
    let Some(stages) = stages else {
        error!(
            "the machine takes no times of its stages; set host.stages = true and start it again"
        );
        return ExitCode::FAILURE;
    };
    for stage in stages {
        let name = stage
            .get("stage")
            .and_then(Value::as_str)
            .unwrap_or("stage");
        let buckets = stage.get("buckets").cloned().unwrap_or_default();
        let buckets: Vec<(u64, u64)> = serde_json::from_value(buckets).unwrap_or_default();
        let file = dir.join(format!("{name}.hgrm"));
        if let Err(e) = std::fs::write(&file, hgrm(&buckets, 1000.0)) {
            error!("{}: {e}", file.display());
            return ExitCode::FAILURE;
        }
        println!("{}", file.display());
    }
    ExitCode::SUCCESS
}

/// One line a value; zero counters are left out.
fn table(document: &Value) -> String {
    let mut lines = Vec::new();
    flatten("", document, &mut lines);
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    lines
        .iter()
        .map(|(name, value)| format!("{name:width$}  {value}\n"))
        .collect()
}

fn flatten(prefix: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    let name = |part: &str| match prefix {
        "" => part.to_owned(),
        prefix => format!("{prefix}.{part}"),
    };
    match value {
        Value::Object(fields) => {
            // Plain values first, so that the table starts with what names the machine.
            let (plain, nested): (Vec<_>, Vec<_>) = fields
                .iter()
                .partition(|(_, v)| !v.is_object() && !v.is_array());
            for (part, value) in plain.into_iter().chain(nested) {
                flatten(&name(part), value, lines);
            }
        }
        // Whole distributions are for programs.
        Value::Array(_) if prefix.ends_with(".buckets") => {}
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                let of_stage = item.get("stage").and_then(Value::as_str);
                let index = of_stage.map_or_else(|| index.to_string(), str::to_owned);
                flatten(&name(&index), item, lines);
            }
        }
        Value::Null => {}
        Value::Number(n) if n.as_f64() == Some(0.0) => {}
        Value::Number(n) if n.is_f64() => {
            lines.push((
                prefix.to_owned(),
                format!("{:.1}", n.as_f64().unwrap_or_default()),
            ));
        }
        Value::String(text) => lines.push((prefix.to_owned(), text.clone())),
        other => lines.push((prefix.to_owned(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_names_first_and_no_zeroes() {
        let document = serde_json::json!({
            "exits": [{ "sleep": 3, "serial": 0 }],
            "name": "demo",
            "uptime_s": 1.234,
        });
        assert_eq!(
            table(&document),
            "name           demo\nuptime_s       1.2\nexits.0.sleep  3\n"
        );
    }
}
