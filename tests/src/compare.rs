//! The two ways of comparing output, which pass the same tests.
//!
//! Invariant: a test that asks for digests fails if none were compared.

use colo_lab::pair::Settings;
use serde_json::Value;

use crate::bench::Bench;

/// How the secondary's output is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compare {
    /// Byte for byte.
    Bytes,
    /// By keyed digests of its payload.
    Digests,
}

impl Compare {
    /// The usual settings of a pair that compares like this.
    pub fn settings(self, bench: &Bench) -> Settings {
        Settings {
            digests: self == Self::Digests,
            ..bench.settings()
        }
    }

    /// A primary's status shows that it has compared like this.
    pub fn assert_used(self, status: &Value) {
        let digests = status["digests"].as_u64();
        match self {
            Self::Bytes => assert_eq!(digests, Some(0), "{status:#}"),
            Self::Digests => assert!(digests > Some(0), "{status:#}"),
        }
    }
}

/// Makes two tests of each `fn NAME(compare: Compare)`: `NAME::bytes` and `NAME::digests`.
#[macro_export]
macro_rules! both_ways {
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            #[test]
            fn bytes() {
                super::$name($crate::compare::Compare::Bytes);
            }

            #[test]
            fn digests() {
                super::$name($crate::compare::Compare::Digests);
            }
        })+
    };
}
