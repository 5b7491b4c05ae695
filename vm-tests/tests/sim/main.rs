//! Deterministic simulation of a whole cluster: MDS, chunkservers, clients and an administrator in one thread, on a simulated network, clock and disk,
//! repeatable by seed.
//!
//! | file | what |
//! | --- | --- |
//! | `world.rs` | what a seed asks for, from start to judgement |
//! | `hosts.rs` | processes on paused clocks, killing and power |
//! | `net.rs` | connections, delays, holds, cuts |
//! | `entropy.rs` | random bytes and time of day |
//! | `faults.rs` | what goes wrong by chance |
//! | `races.rs`, `actors.rs` | what goes wrong by plan |
//! | `invariants/` | what must hold |
//! | `runs.rs` | many seeds, each in a process of its own; canaries; what CI runs |
//!
//! It has a `main` of its own because each seed gets a fresh process (this program again): counters that a process has once, tokio's
//! among them, would else carry over from one seed to the next.

mod actors;
mod entropy;
mod faults;
mod hosts;
mod invariants;
mod net;
mod races;
mod runs;
mod world;

fn main() -> anyhow::Result<()> {
    runs::main()
}
