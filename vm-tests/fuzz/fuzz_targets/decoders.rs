//! libFuzzer over one of the targets of `vm-tests/src/fuzz`: the environment variable `OGEE_FUZZ` names it. One binary for all, because
//! linking each costs more than fuzzing it. `scripts/fuzz.sh` runs them all.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static RUN: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("OGEE_FUZZ").unwrap_or_default();
    let found = ogee_vm_tests::fuzz::find(&name);
    let names: Vec<&str> = ogee_vm_tests::fuzz::TARGETS.iter().map(|t| t.name).collect();
    found.unwrap_or_else(|| panic!("OGEE_FUZZ={name:?} names no target; there are {names:?}")).run
});

fuzz_target!(|data: &[u8]| RUN(data));
