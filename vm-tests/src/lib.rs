//! Boots real guests under QEMU, and runs real Ogee daemons, for the tests in `tests/`.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`appliance`] | programs of this machine on a disk for a guest |
//! | [`image`] | the golden image: kernel, busybox, boot loader and a data partition, made from Debian packages |
//! | [`qemu`] | which QEMU, which accelerator, and the arguments for a disk |
//! | [`vm`] | a running guest: wait for text, run commands, reboot, power off |
//! | [`flips`] | single bytes flipped on a chunkserver's disk |
//! | [`fuzz`] | hostile bytes for every decoder |
//! | [`gate`] | a proxy before one server that can be shut |
//! | [`hammer`] | verified load in a guest |
//! | [`history`] | record of every request, and a checker of the promises |
//! | [`load`] | verified load through the SDK |
//! | [`cluster`] | a running Ogee cluster from the real binary: commands, kill, stop, restart |
//! | [`libvirt`] | a libvirtd of the test's own, and a guest that it runs |
//! | [`migrate`] | a guest moved from one QEMU to another |
//! | [`nbd`] | a running `ogee nbd serve`, and NBD clients |
//! | [`shell`] | the guest's shell over its serial line |
//! | [`torture`] | real processes under faults, with the history checked |
//! | [`vhost`] | a process that serves a disk on a vhost-user socket |
//!
//! Invariants of the whole crate: nothing started here outlives the test process, however that ends (children are tied to it by
//! the kernel, detached daemons by [`reaper`]); every wait has a deadline and says in its error what it waited for and what it saw;
//! nothing uses a fixed port or a path that two runs share, except the image cache, which has a lock.
//! This is test support: it uses blocking IO and threads, and errors are `anyhow`.

pub mod appliance;
pub mod cluster;
pub mod console;
pub mod deadline;
pub mod flips;
pub mod fuzz;
pub mod gate;
pub mod hammer;
pub mod history;
pub mod image;
pub mod libvirt;
pub mod load;
pub mod migrate;
pub mod nbd;
pub mod places;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod reaper;
pub mod shell;
pub mod torture;
pub mod vhost;
pub mod vm;
