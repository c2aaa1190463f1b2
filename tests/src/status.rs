//! What a status document says.
//!
//! Panics name what is missing, as tests do.

use serde_json::Value;

/// A count of a document or of a part of it.
pub fn number(status: &Value, key: &str) -> u64 {
    let number = status[key].as_u64();
    number.unwrap_or_else(|| panic!("no {key} in {status:#}"))
}
