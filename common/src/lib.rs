//! Domain words shared by every Ogee crate: ids, units, limits, geometry, checksums, clock and random source.
//!
//! Called by every other crate. It keeps three invariants: an id of one kind cannot be passed for another; every
//! limit has one name ([`limits`]) and the relations between limits are asserted at compile time; time and randomness
//! are only read through [`clock`] and [`rng`], so that a simulation can replace them. Deliberately absent: IO, async
//! tasks, configuration, anything that only one crate needs.

pub mod checksum;
pub mod clock;
pub mod geometry;
pub mod id;
pub mod limits;
pub mod name;
pub mod qos;
pub mod rng;
pub mod sim;
pub mod size;
