//! Which IO comes next. Pure: the same seed gives the same sequence.
//!
//! Invariants: every operation lies in the plan's blocks; a random plan draws each block with the same probability; a
//! sequential plan begins anew at its end; a sweep visits each block once and then ends.

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Makes durable.
    Flush,
    /// Gives space back.
    Discard,
}

/// One IO: blocks `block .. block + count` of the working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Op {
    /// What.
    pub(crate) verb: Verb,
    /// First block.
    pub(crate) block: u64,
    /// Blocks.
    pub(crate) count: u64,
}

/// Where the next IO goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Anywhere.
    Random,
    /// Behind the last one.
    Sequential,
}

/// What a load consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mix {
    /// Where IO goes.
    pub(crate) order: Order,
    /// What is done when it is not a read.
    pub(crate) change: Verb,
    /// Reads among 100 operations.
    pub(crate) read_percent: u32,
    /// A flush after so many writes of a job; 0: never.
    pub(crate) flush_every: u32,
}

/// Blocks `first .. first + count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// The first.
    pub(crate) first: u64,
    /// How many; at least 1.
    pub(crate) count: u64,
}

/// The sequence of one job.
#[derive(Debug, Clone)]
pub(crate) enum Plan {
    /// Load without end.
    Load {
        /// What it consists of.
        mix: Mix,
        /// Where.
        blocks: Blocks,
        /// Random numbers.
        random: SplitMix64,
        /// Next block of a sequential load, from the first one.
        cursor: u64,
        /// Writes since the last flush.
        unflushed: u32,
    },
    /// Every block once, several at a time.
    Sweep {
        /// What is done.
        verb: Verb,
        /// The next block.
        next: u64,
        /// Behind the last block.
        end: u64,
        /// Blocks of one IO.
        stride: u64,
    },
}

impl Plan {
    /// A load without end.
    #[must_use]
    pub(crate) fn load(mix: Mix, blocks: Blocks, seed: u64) -> Self {
        Self::Load { mix, blocks, random: SplitMix64(seed), cursor: 0, unflushed: 0 }
    }

    /// Every block once.
    #[must_use]
    pub(crate) fn sweep(verb: Verb, blocks: Blocks, stride: u64) -> Self {
        Self::Sweep { verb, next: blocks.first, end: blocks.first + blocks.count, stride }
    }

    /// The next IO; `None` at the end of a sweep.
    pub(crate) fn next(&mut self) -> Option<Op> {
        match self {
            Self::Sweep { verb, next, end, stride } => {
                let count = (*end - *next).min(*stride);
                let op = Op { verb: *verb, block: *next, count };
                *next += count;
                (count > 0).then_some(op)
            }
            Self::Load { mix, blocks, random, cursor, unflushed } => {
                if mix.flush_every > 0 && *unflushed >= mix.flush_every {
                    *unflushed = 0;
                    return Some(Op { verb: Verb::Flush, block: blocks.first, count: 0 });
                }
                let is_read = mix.read_percent >= 100 || random.below(100) < u64::from(mix.read_percent);
                let verb = if is_read { Verb::Read } else { mix.change };
                let at = match mix.order {
                    Order::Random => random.below(blocks.count),
                    Order::Sequential => std::mem::replace(cursor, (*cursor + 1) % blocks.count),
                };
                *unflushed += u32::from(verb == Verb::Write);
                Some(Op { verb, block: blocks.first + at, count: 1 })
            }
        }
    }
}

/// The generator SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
#[derive(Debug, Clone)]
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    /// 64 random bits.
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, by multiplication (Lemire 2019, without the rejection: off by at most n / 2^64).
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        let wide = (u128::from(self.next_u64()) * u128::from(n)) >> 64;
        u64::try_from(wide).expect("the product of two 64-bit numbers, shifted by 64 bits")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: Blocks = Blocks { first: 10, count: 7 };

    fn mix(order: Order, read_percent: u32) -> Mix {
        Mix { order, change: Verb::Write, read_percent, flush_every: 0 }
    }

    fn take(plan: &mut Plan, n: usize) -> Vec<Op> {
        std::iter::from_fn(|| plan.next()).take(n).collect()
    }

    #[test]
    fn splitmix_gives_the_published_sequence() {
        let mut random = SplitMix64(1_234_567);
        assert_eq!(random.next_u64(), 6_457_827_717_110_365_317);
        assert_eq!(random.next_u64(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn a_sequence_begins_anew_at_its_end() {
        let mut plan = Plan::load(mix(Order::Sequential, 0), BLOCKS, 1);
        let at: Vec<u64> = take(&mut plan, 9).iter().map(|op| op.block).collect();
        assert_eq!(at, vec![10, 11, 12, 13, 14, 15, 16, 10, 11]);
    }

    #[test]
    fn random_blocks_are_equally_likely_and_follow_the_seed() {
        let mut plan = Plan::load(mix(Order::Random, 0), BLOCKS, 1);
        let ops = take(&mut plan, 7000);
        for block in 10..17 {
            let n = ops.iter().filter(|op| op.block == block).count();
            assert!((850..1150).contains(&n), "block {block}: {n} of 7000");
        }
        assert!(ops.iter().all(|op| (10..17).contains(&op.block)));
        assert_eq!(ops, take(&mut Plan::load(mix(Order::Random, 0), BLOCKS, 1), 7000));
        assert_ne!(ops, take(&mut Plan::load(mix(Order::Random, 0), BLOCKS, 2), 7000));
    }

    #[test]
    fn the_mix_is_kept() {
        for percent in [0, 70, 100] {
            let ops = take(&mut Plan::load(mix(Order::Random, percent), BLOCKS, 3), 10_000);
            let reads = ops.iter().filter(|op| op.verb == Verb::Read).count();
            let want = percent as usize * 100;
            assert!(reads.abs_diff(want) <= if percent == 70 { 200 } else { 0 }, "{percent}: {reads}");
        }
    }

    #[test]
    fn flushes_come_after_so_many_writes() {
        let mix = Mix { flush_every: 2, ..mix(Order::Sequential, 0) };
        let verbs: Vec<Verb> = take(&mut Plan::load(mix, BLOCKS, 1), 6).iter().map(|op| op.verb).collect();
        use Verb::{Flush, Write};
        assert_eq!(verbs, vec![Write, Write, Flush, Write, Write, Flush]);
    }

    #[test]
    fn a_sweep_visits_every_block_once() {
        let mut plan = Plan::sweep(Verb::Read, BLOCKS, 3);
        let ops: Vec<(u64, u64)> = std::iter::from_fn(|| plan.next()).map(|op| (op.block, op.count)).collect();
        assert_eq!(ops, vec![(10, 3), (13, 3), (16, 1)]);
    }
}
