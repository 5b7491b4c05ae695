//! The `ogee` command. Everything is in the library, so that parsers can be fuzzed and tested.

use std::process::ExitCode;

fn main() -> ExitCode {
    ogee_cli::run(std::env::args_os())
}
