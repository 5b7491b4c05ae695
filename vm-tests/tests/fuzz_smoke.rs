//! Every fuzz target over its corpus and over changes of it, by seed: a smoke run for the gate. `make fuzz` looks for new paths.

use ogee_vm_tests::fuzz::{TARGETS, Target};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Bytes of an input.
const INPUT_MAX: usize = 4096;
/// The runs of a target take place so many times.
const ROUNDS: u32 = 10;
/// Values that decoders stumble over.
const EDGES: [&[u8]; 8] = [&[0], &[0xff], &[0x7f], &[0x80], &[0xff; 4], &[0xff; 8], &[0, 0, 0, 0x80], &[0, 0, 1, 0]];

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("the corpus {}: {e}", folder.display()));
    let mut files: Vec<_> = entries.map(|e| e.expect("an entry").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "the corpus of {} is empty", target.name);
    files.iter().map(|f| fs::read(f).expect("an input")).collect()
}

fn change(input: &mut Vec<u8>, other: &[u8], rng: &mut StdRng) {
    let at = rng.random_range(0..=input.len());
    match rng.random_range(0..6) {
        0 if at < input.len() => input[at] ^= 1 << rng.random_range(0..8),
        1 if at < input.len() => input[at] = rng.random(),
        2 => input.truncate(at),
        3 => {
            let edge = EDGES.choose(rng).expect("some");
            let end = (at + edge.len()).min(input.len());
            input.splice(at..end, edge.iter().copied());
        }
        4 => {
            let from = rng.random_range(0..=other.len());
            input.splice(at.., other[from..].iter().copied());
        }
        _ => input.insert(at, rng.random()),
    }
    input.truncate(INPUT_MAX);
}

#[test]
fn no_target_breaks_a_promise() {
    let mut broken = vec![];
    for target in TARGETS {
        let (corpus, mut rng) = (corpus(&target), StdRng::seed_from_u64(1));
        let mut feed = |input: &[u8]| {
            if catch_unwind(AssertUnwindSafe(|| (target.run)(input))).is_err() {
                broken.push(format!("{}: {:02x?}", target.name, input));
            }
            broken.len() < 5
        };
        let mut goes_on = corpus.iter().all(|input| feed(input));
        for _ in 0..target.smoke_runs * ROUNDS {
            let mut input = corpus.choose(&mut rng).expect("some").clone();
            let other = corpus.choose(&mut rng).expect("some").clone();
            (0..rng.random_range(1..6)).for_each(|_| change(&mut input, &other, &mut rng));
            goes_on = goes_on && feed(&input);
        }
        println!("{}: {} inputs of the corpus, {} changes of them", target.name, corpus.len(), target.smoke_runs * ROUNDS);
    }
    assert!(broken.is_empty(), "targets broke on:\n{}", broken.join("\n"));
}
