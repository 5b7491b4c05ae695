//! Progress of a long copy: a bar with rate and time left, on a terminal only.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;

/// A bar that counts bytes; invisible when standard error is no terminal or programs read the output. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// A bar that counts things, named by a word such as `rebuild`.
    #[must_use]
    pub(crate) fn items(name: &'static str, total: u64, quiet: bool) -> Self {
        Self::with_template(name, total, quiet, "{msg} [{bar:32}] {pos}/{len} ETA {eta}")
    }

    /// A bar for `total_bytes`, named by a word such as `import`.
    #[must_use]
    pub(crate) fn new(name: &'static str, total_bytes: u64, quiet: bool) -> Self {
        Self::with_template(name, total_bytes, quiet, "{msg} [{bar:32}] {bytes}/{total_bytes} {binary_bytes_per_sec} ETA {eta}")
    }

    fn with_template(name: &'static str, total: u64, quiet: bool, template: &str) -> Self {
        let visible = !quiet && std::io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(name);
        Self(bar)
    }

    /// So many more bytes are done.
    pub(crate) fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// Removes the bar, before a result or an error is printed.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}
