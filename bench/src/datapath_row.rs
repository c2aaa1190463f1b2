//! A row of `datapath`: what was measured, with figures whose names say their units.
//!
//! Invariants: a figure that was not measured is not there; `peer_` begins the names of the
//! baseline's figures, which come from the same run.

use serde_json::{Map, Value, json};

use crate::figures::Range;

/// Named numbers, in the order in which they are shown.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures(Vec<(String, f64)>);

impl Figures {
    /// Adds one.
    pub(crate) fn with(mut self, name: impl Into<String>, value: f64) -> Self {
        self.0.push((name.into(), value));
        self
    }

    /// Adds all of another's, with something before their names.
    pub(crate) fn with_all(mut self, prefix: &str, other: Self) -> Self {
        let named = other
            .0
            .into_iter()
            .map(|(name, value)| (format!("{prefix}{name}"), value));
        self.0.extend(named);
        self
    }

    /// Finds one.
    pub(crate) fn get(&self, name: &str) -> Option<f64> {
        let mut found = self.0.iter().filter(|(known, _)| known == name);
        found.next().map(|(_, value)| *value)
    }

    /// The median of each over several rounds; what a round lacks does not count in it.
    pub(crate) fn median(rounds: &[Self]) -> Self {
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in rounds.iter().flat_map(|round| &round.0) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        let median = |name: &str| Range::of(rounds.iter().filter_map(|r| r.get(name))).median;
        Self(
            names
                .into_iter()
                .map(|name| (name.to_owned(), median(name)))
                .collect(),
        )
    }

    /// How much larger a figure is than the baseline's of the same name, if both are there: the
    /// ratio.
    pub(crate) fn against_peer(&self, name: &str) -> Option<f64> {
        let peer = self.get(&format!("peer_{name}"))?;
        (peer > 0.0).then_some(self.get(name)? / peer)
    }
}

/// One line of the report.
#[derive(Debug)]
pub(crate) struct Row {
    kind: &'static str,
    /// Bytes of payload; none where nothing is sent.
    payload: Option<usize>,
    labels: Vec<(&'static str, String)>,
    pub(crate) figures: Figures,
}

impl Row {
    pub(crate) fn new(kind: &'static str, payload: Option<usize>, figures: Figures) -> Self {
        Self {
            kind,
            payload,
            labels: Vec::new(),
            figures,
        }
    }

    /// Adds what else tells this row from others.
    pub(crate) fn label(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.labels.push((name, value.into()));
        self
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("kind".to_owned(), json!(self.kind));
        fields.insert("payload".to_owned(), json!(self.payload));
        for (name, value) in &self.labels {
            fields.insert((*name).to_owned(), json!(value));
        }
        for (name, value) in &self.figures.0 {
            fields.insert(name.clone(), json!(value));
        }
        Value::Object(fields)
    }

    /// For people: a heading, then a figure a line with the baseline's beside it.
    pub(crate) fn text(&self) -> String {
        let mut heading = vec![self.kind.to_owned()];
        heading.extend(self.payload.map(|bytes| format!("{bytes} bytes")));
        heading.extend(
            self.labels
                .iter()
                .map(|(name, value)| format!("{name} {value}")),
        );
        let mut text = format!("\n{}\n", heading.join(", "));
        for (name, value) in &self.figures.0 {
            let is_shown = name
                .strip_prefix("peer_")
                .is_some_and(|own| self.figures.get(own).is_some());
            if is_shown {
                continue;
            }
            let peer = self.figures.get(&format!("peer_{name}"));
            let peer = peer.map(|value| format!("   peer {:>12}", digits(value)));
            let line = format!(
                "  {name:<34} {:>12}{}",
                digits(*value),
                peer.unwrap_or_default()
            );
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

/// Four digits are enough.
fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        small if small < 10.0 => 3,
        middle if middle < 1000.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(rate: f64, peer: f64) -> Figures {
        let peer = Figures::default().with("packets_per_s", peer);
        Figures::default()
            .with("packets_per_s", rate)
            .with_all("peer_", peer)
    }

    #[test]
    fn medians_are_taken_figure_by_figure() {
        let rounds = [
            figures(5.0, 1.0),
            figures(7.0, 3.0),
            figures(6.0, 2.0).with("p50_us", 4.0),
        ];
        let median = Figures::median(&rounds);
        assert_eq!(median.get("packets_per_s"), Some(6.0));
        assert_eq!(median.get("p50_us"), Some(4.0));
        assert_eq!(median.against_peer("packets_per_s"), Some(3.0));
        assert_eq!(median.against_peer("p50_us"), None);
        assert_eq!(figures(1.0, 0.0).against_peer("packets_per_s"), None);
    }

    #[test]
    fn a_row_shows_each_figure_once() {
        let figures = figures(1234.5, 0.25).with("ratio", 3.0);
        let row = Row::new("echo", Some(64), figures).label("nic", "tap");
        let text = row.text();
        assert!(text.starts_with("\necho, 64 bytes, nic tap\n"), "{text}");
        assert_eq!(text.matches("packets_per_s").count(), 1, "{text}");
        assert!(
            text.contains("1234") && text.contains("peer        0.250"),
            "{text}"
        );
        let json = row.json();
        assert_eq!(json["kind"], "echo");
        assert_eq!(json["payload"], 64);
        assert_eq!(json["nic"], "tap");
        assert_eq!(json["peer_packets_per_s"], 0.25);
        assert_eq!(
            Row::new("idle", None, Figures::default()).json()["payload"],
            Value::Null
        );
    }
}
