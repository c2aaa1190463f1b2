//! `colo status`: asks a running machine and shows the answer to a person or a program.

use std::path::Path;
use std::process::ExitCode;

use colo_vmm::status::ask;
use serde_json::Value;
use tracing::error;

/// Prints the status behind a socket.
pub(crate) fn show(socket: &Path, json: bool) -> ExitCode {
    match ask(socket) {
        Ok(document) if json => {
            println!("{document:#}");
            ExitCode::SUCCESS
        }
        Ok(document) => {
            print!("{}", table(&document));
            ExitCode::SUCCESS
        }
        Err(e) => {
            error!("{e}; is the machine running?");
            ExitCode::FAILURE
        }
    }
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
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&name(&index.to_string()), item, lines);
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
