//! What the store tests share: a replica over a temporary directory that can be killed in several ways, and a world that
//! makes log entries together with an oracle of what every view must read.
#![allow(dead_code, missing_docs, unreachable_pub)] // each test binary uses a part

pub mod ops;
pub mod page_maps;
pub mod replica;
pub mod world;

/// Small pseudo-random numbers from a seed that the test case gives (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub fn below32(&mut self, n: u32) -> u32 {
        u32::try_from(self.below(u64::from(n))).expect("below a 32-bit bound")
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[usize::try_from(self.below(items.len() as u64)).expect("an index")]
    }
}

/// Runs a test on one current-thread runtime, as the chunkserver does.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(test)
}
