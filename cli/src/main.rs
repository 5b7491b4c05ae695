//! The `ogee` command. Everything is in the library, so that parsers can be fuzzed and tested.

use std::process::ExitCode;

/// The C library's allocator trims its heap when a burst of writes has ended and faults the pages in again for the next.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    ogee_cli::run(std::env::args_os())
}
