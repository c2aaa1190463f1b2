//! Colours and a line that is drawn over, where standard output is a terminal.
//!
//! Does nothing where it is not, or where `NO_COLOR` is set.

use std::io::{IsTerminal, Write};

/// How to write to this standard output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Paint {
    terminal: bool,
    colours: bool,
}

impl Paint {
    pub(super) fn for_stdout() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self {
            terminal,
            colours: terminal && wanted,
        }
    }

    #[cfg(test)]
    pub(super) fn plain() -> Self {
        Self {
            terminal: false,
            colours: false,
        }
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    pub(super) fn strong(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    pub(super) fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(super) fn bad(self, text: &str) -> String {
        self.with("1;31", text)
    }

    pub(super) fn tint(self, text: &str) -> String {
        self.with("36", text)
    }

    /// Draws a line over the last one.
    pub(super) fn show_line(self, line: &str) {
        if self.terminal {
            print!("\r\x1b[2K{line}");
            // A line that is not shown is no loss.
            std::io::stdout().flush().ok();
        }
    }

    pub(super) fn clear_line(self) {
        self.show_line("");
    }
}
