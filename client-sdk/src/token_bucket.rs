//! The limits of a volume as token buckets, and the order in which IOs pass them. Pure: time is given.
//!
//! A **bucket** gains `rate` tokens a second up to its capacity; an IO takes one token (of IOs) or its bytes (of bytes). It
//! passes when the tokens are there **or the bucket is full**: then it takes what it costs, and the bucket is in debt. So
//! IOs above the capacity pass too, and in any time `t` no more than `rate * t` and the larger of capacity and largest IO
//! passes. A limit with a burst has two buckets. The one of the rate holds what a volume saves up while it rests:
//! `(burst - rate) * seconds`, so that one that does `burst` empties it in just these seconds. The one of the burst keeps
//! it from doing more than that. Each holds what [`SLACK`] gives besides, because a timer may come late.
//!
//! **Order.** Reads wait in one line and writes (discards and write-zeroes too) in another, each first come, first served,
//! so that a limit on writes alone holds up no read. Where both lines want tokens of the same bucket, the older head
//! comes first and the younger waits for it, however small it is. A head that waits for tokens of its own line alone
//! does not hold up the other line. So nobody starves: a head's own buckets fill for nobody else, and once they have
//! what it wants, it is the oldest in the end.
//!
//! Used by `throttle.rs` under its lock. Memory: one small entry for each IO that waits, as many as front ends have in
//! flight (`VHOST_QUEUE_SIZE_MAX` for each virtqueue, `NBD_CONNECTION_REQUESTS_MAX` for each NBD connection).

use ogee_common::qos::{LimitKind, RateLimit, VolumeLimits};
use std::collections::VecDeque;
use std::time::Duration;

/// What every bucket holds besides its burst: what the rate gives in this time, at least one token. Timers are precise to
/// a millisecond, and a busy machine may wake a thread late by more.
const SLACK: Duration = Duration::from_millis(100);
/// Levels are counted in parts of a token, so that a rate of one a second is one part a nanosecond.
const PARTS: i128 = 1_000_000_000;

/// The line that an IO waits in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Reads.
    Read = 0,
    /// Writes, discards, write-zeroes.
    Write = 1,
}

impl Lane {
    const BOTH: [Self; 2] = [Self::Read, Self::Write];

    /// The limits that concern only this line.
    const fn own(self) -> [LimitKind; 2] {
        match self {
            Self::Read => [LimitKind::ReadIops, LimitKind::ReadBytes],
            Self::Write => [LimitKind::WriteIops, LimitKind::WriteBytes],
        }
    }
}

/// The limits that both lines share.
const SHARED: [LimitKind; 2] = [LimitKind::Iops, LimitKind::Bytes];

/// One bucket. Levels and capacity are in [`PARTS`].
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: i128,
    capacity: i128,
    /// Negative: a debt.
    level: i128,
}

impl Bucket {
    /// A full bucket that holds `burst` tokens and the slack.
    fn full(rate: u64, burst: i128) -> Self {
        let rate = i128::from(rate);
        let slack = (rate * nanos(SLACK)).max(PARTS);
        let capacity = slack.saturating_add(burst.saturating_mul(PARTS));
        Self { rate, capacity, level: capacity }
    }

    fn gain(&mut self, elapsed: Duration) {
        let gained = self.rate.saturating_mul(nanos(elapsed));
        self.level = self.level.saturating_add(gained).min(self.capacity);
    }

    /// Until an IO of this cost may pass; zero: now. One that costs nothing does not wait for a debt.
    fn wait(&self, cost: u64) -> Duration {
        let missing = parts(cost).min(self.capacity) - self.level;
        if missing <= 0 || cost == 0 {
            return Duration::ZERO;
        }
        // Rounded up, so that nobody looks too early again and again. A debt is bounded by one IO.
        let wait = missing.div_euclid(self.rate).saturating_add(1);
        Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX))
    }

    fn take(&mut self, cost: u64) {
        self.level = self.level.saturating_sub(parts(cost));
    }
}

fn nanos(duration: Duration) -> i128 {
    i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX)
}

fn parts(tokens: u64) -> i128 {
    i128::from(tokens) * PARTS
}

/// One limit.
#[derive(Debug, Clone, Copy)]
struct Meter {
    limit: RateLimit,
    sustained: Bucket,
    peak: Option<Bucket>,
}

impl Meter {
    /// `None`: no limit.
    fn new(limit: RateLimit) -> Option<Self> {
        let saved = i128::from(limit.burst.saturating_sub(limit.rate)) * i128::from(limit.burst_seconds);
        let peak = (saved > 0).then(|| Bucket::full(limit.burst, 0));
        (!limit.is_none()).then(|| Self { limit, sustained: Bucket::full(limit.rate, saved), peak })
    }

    /// The meter of a new limit after one of another limit: what was saved up stays, as far as it fits; a debt is let go.
    fn after(mut self, before: &Self) -> Self {
        self.sustained.level = before.sustained.level.clamp(0, self.sustained.capacity);
        self
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        std::iter::once(&mut self.sustained).chain(&mut self.peak)
    }

    fn wait(&self, cost: u64) -> Duration {
        let peak = self.peak.as_ref().map_or(Duration::ZERO, |peak| peak.wait(cost));
        self.sustained.wait(cost).max(peak)
    }
}

/// An IO that waits.
#[derive(Debug)]
struct Waiting<W> {
    bytes: u64,
    /// Its place among those of both lines.
    arrival: u64,
    /// Nobody waits for it any more.
    gone: bool,
    waker: W,
}

/// A line: the entry at position `i` has the number `first + i`; all lower numbers have passed.
#[derive(Debug)]
struct Line<W> {
    first: u64,
    queue: VecDeque<Waiting<W>>,
}

/// The limits of a volume and the IOs that wait for them; `W` is what wakes one.
#[derive(Debug)]
pub(crate) struct Lines<W> {
    limits: VolumeLimits,
    meters: [Option<Meter>; LimitKind::ALL.len()],
    lines: [Line<W>; 2],
    arrivals: u64,
    now: Duration,
}

impl<W: Default> Lines<W> {
    /// Nobody waits, and nothing is limited. Times are durations since a moment of the caller's choice.
    pub(crate) fn new() -> Self {
        let line = || Line { first: 0, queue: VecDeque::new() };
        let meters = [None; LimitKind::ALL.len()];
        Self { limits: VolumeLimits::NONE, meters, lines: [line(), line()], arrivals: 0, now: Duration::ZERO }
    }

    /// The limits as they are.
    pub(crate) fn limits(&self) -> VolumeLimits {
        self.limits
    }

    /// Sets the limits. Meters of limits that stay go on; a limit that is new begins with everything saved up. Whoever
    /// may pass now does with the next [`Lines::advance`].
    pub(crate) fn set(&mut self, now: Duration, limits: VolumeLimits) {
        self.gain(now);
        for kind in LimitKind::ALL {
            let (slot, limit) = (&mut self.meters[kind as usize], limits.get(kind));
            *slot = match *slot {
                Some(meter) if meter.limit == limit => Some(meter),
                Some(before) => Meter::new(limit).map(|meter| meter.after(&before)),
                None => Meter::new(limit),
            };
        }
        self.limits = limits;
    }

    /// Puts an IO at the end of its line and gives its number.
    pub(crate) fn join(&mut self, lane: Lane, bytes: u64) -> u64 {
        let arrival = self.arrivals;
        self.arrivals += 1;
        let line = &mut self.lines[lane as usize];
        line.queue.push_back(Waiting { bytes, arrival, gone: false, waker: W::default() });
        line.first + line.queue.len() as u64 - 1
    }

    /// Where to put what wakes an IO; `None`: it has passed.
    pub(crate) fn waker(&mut self, lane: Lane, number: u64) -> Option<&mut W> {
        let line = &mut self.lines[lane as usize];
        let at = usize::try_from(number.checked_sub(line.first)?).ok()?;
        line.queue.get_mut(at).map(|waiting| &mut waiting.waker)
    }

    /// Whether an IO is the first of its line.
    pub(crate) fn is_head(&self, lane: Lane, number: u64) -> bool {
        self.lines[lane as usize].first == number
    }

    /// An IO that has not passed is given up: it takes no tokens.
    pub(crate) fn leave(&mut self, lane: Lane, number: u64) {
        let line = &mut self.lines[lane as usize];
        let at = number.checked_sub(line.first).and_then(|at| usize::try_from(at).ok());
        if let Some(waiting) = at.and_then(|at| line.queue.get_mut(at)) {
            waiting.gone = true;
            waiting.waker = W::default();
        }
    }

    /// Lets everything pass that may, in order, and says how long it will be until something else may; `None` when
    /// nobody waits. `passed` is given what wakes each.
    pub(crate) fn advance(&mut self, now: Duration, mut passed: impl FnMut(W)) -> Option<Duration> {
        self.gain(now);
        loop {
            let mut due = None;
            let mut oldest: Option<(u64, Lane)> = None;
            for lane in Lane::BOTH {
                let Some((arrival, bytes)) = self.head(lane) else { continue };
                let own = self.wait(lane.own(), bytes);
                if own > Duration::ZERO {
                    due = earlier(due, own);
                } else if oldest.is_none_or(|(first, _)| arrival < first) {
                    oldest = Some((arrival, lane));
                }
            }
            let Some((_, lane)) = oldest else { return due };
            let bytes = self.head(lane).map_or(0, |(_, bytes)| bytes);
            let shared = self.wait(SHARED, bytes);
            if shared > Duration::ZERO {
                return earlier(due, shared);
            }
            self.take(lane, bytes);
            let line = &mut self.lines[lane as usize];
            if let Some(waiting) = line.queue.pop_front() {
                line.first += 1;
                passed(waiting.waker);
            }
        }
    }

    fn gain(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        self.meters.iter_mut().flatten().flat_map(Meter::buckets).for_each(|bucket| bucket.gain(elapsed));
    }

    /// Arrival and bytes of the first in a line that is still waited for.
    fn head(&mut self, lane: Lane) -> Option<(u64, u64)> {
        let line = &mut self.lines[lane as usize];
        while line.queue.front().is_some_and(|waiting| waiting.gone) {
            line.queue.pop_front();
            line.first += 1;
        }
        line.queue.front().map(|waiting| (waiting.arrival, waiting.bytes))
    }

    fn wait(&self, kinds: [LimitKind; 2], bytes: u64) -> Duration {
        let of = |kind: LimitKind| self.meters[kind as usize].map_or(Duration::ZERO, |meter| meter.wait(cost(kind, bytes)));
        kinds.map(of).into_iter().max().unwrap_or_default()
    }

    fn take(&mut self, lane: Lane, bytes: u64) {
        for kind in SHARED.into_iter().chain(lane.own()) {
            if let Some(meter) = &mut self.meters[kind as usize] {
                meter.buckets().for_each(|bucket| bucket.take(cost(kind, bytes)));
            }
        }
    }
}

/// What an IO of so many bytes takes of a kind.
const fn cost(kind: LimitKind, bytes: u64) -> u64 {
    if kind.counts_bytes() { bytes } else { 1 }
}

fn earlier(a: Option<Duration>, b: Duration) -> Option<Duration> {
    Some(a.map_or(b, |a| a.min(b)))
}

#[cfg(test)]
mod tests;
