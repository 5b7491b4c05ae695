//! Random bytes and time of day of the simulation's thread: replaces the two functions of the C library that everything asks, so that hash
//! maps, `rand`, openraft, tokio and hyper repeat themselves with a seed.
//!
//! Invariants: on a thread that was not seeded both functions do what the system does; a seeded thread draws from one stream, in the
//! order of execution, which is the same in every run because the simulation has one thread. Absent: cryptography, of which the simulation has none.
#![allow(unsafe_code)]

use std::cell::Cell;

thread_local! {
    static STATE: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From now on this thread draws its random bytes from `seed`.
pub(crate) fn seed(seed: u64) {
    STATE.set(Some(seed));
}

fn next(state: u64) -> (u64, u64) {
    // SplitMix64 (Steele, Lea, Flood 2014).
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (state, z ^ (z >> 31))
}

/// The C library's function of this name.
///
/// # Safety
/// `buf` is writable for `len` bytes.
// SAFETY: it has the C library's signature and keeps its promise: it writes at most `len` bytes to `buf` and says how many.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(buf: *mut u8, len: usize, flags: u32) -> isize {
    let Some(mut state) = STATE.get() else {
        // SAFETY: the caller's promise is the system call's.
        let rc = unsafe { libc::syscall(libc::SYS_getrandom, buf, len, flags) };
        return isize::try_from(rc).unwrap_or(-1);
    };
    for i in 0..len {
        let (new, word) = next(state);
        state = new;
        // SAFETY: `i` is below `len`.
        unsafe { *buf.add(i) = word.to_le_bytes()[0] };
    }
    STATE.set(Some(state));
    isize::try_from(len).unwrap_or(-1)
}

/// The C library's function of this name.
///
/// # Safety
/// `time` is writable.
// SAFETY: it has the C library's signature and keeps its promise: it fills `time` and gives 0, or fails.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    let simulated = STATE.get().and_then(|_| ogee_common::sim::tick_ns());
    let Some(now) = simulated else {
        // SAFETY: the caller's promise is the system call's.
        let rc = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
        return libc::c_int::try_from(rc).unwrap_or(-1);
    };
    let part = |n: u64| i64::try_from(n).unwrap_or(0);
    // SAFETY: `time` is writable.
    unsafe { *time = libc::timespec { tv_sec: part(now / 1_000_000_000), tv_nsec: part(now % 1_000_000_000) } };
    0
}
