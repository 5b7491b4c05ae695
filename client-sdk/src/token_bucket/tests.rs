//! Tests of the buckets and lines, by example and against what the module promises, with time that is made up.

use super::*;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

fn at_rate(rate: u64) -> RateLimit {
    RateLimit { rate, ..RateLimit::NONE }
}

fn limited(kind: LimitKind, limit: RateLimit) -> Lines<u32> {
    let mut lines = Lines::new();
    lines.set(Duration::ZERO, VolumeLimits::NONE.with(kind, limit));
    lines
}

/// An IO that asks now; whether it passes at once.
fn ask(lines: &mut Lines<u32>, now: Duration, lane: Lane, bytes: u64) -> bool {
    let number = lines.join(lane, bytes);
    lines.advance(now, |_| ());
    lines.waker(lane, number).is_none()
}

/// Puts an IO in line that says `tag` when it passes.
fn tagged(lines: &mut Lines<u32>, lane: Lane, bytes: u64, tag: u32) -> u64 {
    let number = lines.join(lane, bytes);
    *lines.waker(lane, number).expect("it waits") = tag;
    number
}

fn passed(lines: &mut Lines<u32>, now: Duration) -> (Vec<u32>, Option<Duration>) {
    let mut tags = vec![];
    let due = lines.advance(now, |tag| tags.push(tag));
    (tags, due)
}

#[test]
fn a_rate_without_a_burst_is_kept_to_its_slack() {
    let mut lines = limited(LimitKind::Iops, at_rate(100));
    let at_once = (0..50).filter(|_| ask(&mut lines, Duration::ZERO, Lane::Write, 4096)).count();
    assert_eq!(at_once, 10, "what 100 ms give");
    let (tags, due) = passed(&mut lines, SECOND / 10);
    assert_eq!(tags.len(), 10);
    assert!(due.is_some_and(|due| due.abs_diff(SECOND / 100) < Duration::from_micros(1)), "{due:?}");
    assert_eq!(passed(&mut lines, SECOND).0.len(), 10, "no more is saved up");
}

#[test]
fn one_a_second_passes_though_the_slack_is_less_than_one() {
    let mut lines = limited(LimitKind::ReadIops, at_rate(1));
    assert!(ask(&mut lines, Duration::ZERO, Lane::Read, 512));
    assert!(!ask(&mut lines, Duration::ZERO, Lane::Read, 512));
    assert!(passed(&mut lines, SECOND / 2).0.is_empty());
    assert_eq!(passed(&mut lines, SECOND + Duration::from_nanos(1)).0.len(), 1);
}

#[test]
fn a_rested_volume_bursts_for_as_long_as_it_may() {
    let limit = RateLimit { rate: 100, burst: 400, burst_seconds: 10 };
    let mut lines = limited(LimitKind::Iops, limit);
    let mut seconds = vec![];
    for second in 0..20_u32 {
        let mut count = 0;
        for ms in 0..1000 {
            let now = SECOND * second + Duration::from_millis(ms);
            // Always more in line than may pass.
            while lines.lines[0].queue.len() < 100 {
                lines.join(Lane::Read, 512);
            }
            count += passed(&mut lines, now).0.len();
        }
        seconds.push(count);
    }
    assert!(seconds[1..9].iter().all(|count| (399..=401).contains(count)), "{seconds:?}");
    assert!(seconds[10..].iter().all(|count| (99..=101).contains(count)), "{seconds:?}");
    lines.lines[0].queue.clear();
    passed(&mut lines, SECOND * 25);
    let saved = (0..2000).filter(|_| ask(&mut lines, SECOND * 25, Lane::Write, 0)).count();
    assert_eq!(saved, 40, "five seconds of rest saved up 500, of which the burst gives 100 ms at once");
}

#[test]
fn an_io_above_the_capacity_passes_and_leaves_a_debt() {
    let mut lines = limited(LimitKind::WriteBytes, at_rate(1 << 20));
    assert!(ask(&mut lines, Duration::ZERO, Lane::Write, 4 << 20));
    assert!(!ask(&mut lines, Duration::ZERO, Lane::Write, 512), "the debt is paid first");
    assert!(ask(&mut lines, Duration::ZERO, Lane::Read, 4 << 20), "reads are not limited");
    assert!(passed(&mut lines, SECOND * 39 / 10).0.is_empty());
    assert_eq!(passed(&mut lines, SECOND * 4).0.len(), 1);
}

#[test]
fn a_discard_costs_an_io_and_no_bytes() {
    let limits = VolumeLimits::NONE.with(LimitKind::Bytes, at_rate(1 << 20)).with(LimitKind::WriteIops, at_rate(20));
    let mut lines: Lines<u32> = Lines::new();
    lines.set(Duration::ZERO, limits);
    assert!(ask(&mut lines, Duration::ZERO, Lane::Write, 1 << 30), "a debt of bytes");
    assert!(ask(&mut lines, Duration::ZERO, Lane::Write, 0));
    assert!(!ask(&mut lines, Duration::ZERO, Lane::Write, 0), "two IOs are what 100 ms of 20 a second give");
}

#[test]
fn reads_do_not_wait_behind_writes_that_only_writes_are_limited_for() {
    let limits = VolumeLimits::NONE.with(LimitKind::WriteIops, at_rate(1)).with(LimitKind::Iops, at_rate(1000));
    let mut lines: Lines<u32> = Lines::new();
    lines.set(Duration::ZERO, limits);
    assert!(ask(&mut lines, Duration::ZERO, Lane::Write, 512));
    assert!(!ask(&mut lines, Duration::ZERO, Lane::Write, 512));
    assert!(ask(&mut lines, Duration::ZERO, Lane::Read, 512));
}

#[test]
fn the_older_of_two_heads_comes_first_where_both_want_the_same() {
    let mut lines = limited(LimitKind::Bytes, at_rate(10 << 20));
    assert!(ask(&mut lines, Duration::ZERO, Lane::Read, 1 << 20), "everything that was saved up");
    tagged(&mut lines, Lane::Write, 1 << 20, 1);
    tagged(&mut lines, Lane::Read, 512, 2);
    tagged(&mut lines, Lane::Write, 512, 3);
    assert!(passed(&mut lines, SECOND / 20).0.is_empty(), "the small read does not take what the large write waits for");
    assert_eq!(passed(&mut lines, SECOND / 5).0, [1]);
    assert_eq!(passed(&mut lines, SECOND / 4).0, [2, 3]);
}

#[test]
fn lifted_limits_let_everybody_pass_in_order() {
    let mut lines = limited(LimitKind::Iops, at_rate(1));
    assert!(ask(&mut lines, Duration::ZERO, Lane::Read, 512));
    for tag in 0..6 {
        tagged(&mut lines, if tag % 2 == 0 { Lane::Write } else { Lane::Read }, 512, tag);
    }
    assert!(passed(&mut lines, Duration::ZERO).0.is_empty());
    lines.set(Duration::ZERO, VolumeLimits::NONE);
    assert_eq!(passed(&mut lines, Duration::ZERO), (vec![0, 1, 2, 3, 4, 5], None));
}

#[test]
fn other_limits_do_not_reset_what_was_saved_up() {
    let limit = RateLimit { rate: 10, burst: 1000, burst_seconds: 1 };
    let mut lines = limited(LimitKind::Iops, limit);
    while ask(&mut lines, Duration::ZERO, Lane::Read, 512) {}
    passed(&mut lines, SECOND);
    lines.set(SECOND, lines.limits().with(LimitKind::Bytes, at_rate(1 << 30)));
    let before = lines.meters[LimitKind::Iops as usize].expect("limited").sustained.level;
    lines.set(SECOND, lines.limits().with(LimitKind::Iops, RateLimit { burst: 2000, ..limit }));
    assert_eq!(lines.meters[LimitKind::Iops as usize].expect("limited").sustained.level, before);
    lines.set(SECOND, lines.limits().with(LimitKind::Iops, at_rate(20)));
    assert_eq!(lines.meters[LimitKind::Iops as usize].expect("limited").sustained.level, parts(2), "as far as it fits");
}

#[test]
fn who_leaves_takes_nothing_and_holds_up_nobody() {
    let mut lines = limited(LimitKind::Bytes, at_rate(1 << 20));
    assert!(ask(&mut lines, Duration::ZERO, Lane::Write, 1 << 20));
    let first = tagged(&mut lines, Lane::Write, 64 << 20, 1);
    let second = tagged(&mut lines, Lane::Write, 64 << 20, 2);
    tagged(&mut lines, Lane::Write, 512, 3);
    assert!(lines.is_head(Lane::Write, first) && !lines.is_head(Lane::Write, second));
    lines.leave(Lane::Write, second);
    lines.leave(Lane::Write, first);
    assert_eq!(passed(&mut lines, SECOND).0, [3]);
    lines.leave(Lane::Write, first);
    assert_eq!(passed(&mut lines, SECOND), (vec![], None));
}

#[test]
fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
    let mut lines = limited(LimitKind::Iops, at_rate(10));
    assert!(ask(&mut lines, SECOND, Lane::Read, 512));
    tagged(&mut lines, Lane::Read, 512, 1);
    for now in [SECOND, Duration::ZERO, SECOND] {
        assert!(passed(&mut lines, now).0.is_empty());
    }
    assert_eq!(passed(&mut lines, SECOND * 11 / 10 + Duration::from_nanos(1)).0, [1]);
}

/// An IO of the property test.
#[derive(Debug, Clone, Copy)]
struct Io {
    /// Microseconds after the one before.
    after_us: u64,
    lane: Lane,
    bytes: u64,
}

fn io() -> impl Strategy<Value = Io> {
    let bytes = prop_oneof![3 => 1..=16_u64, 2 => 16..=512_u64, 1 => Just(8192)].prop_map(|sectors| sectors * 512);
    let bytes = prop_oneof![8 => bytes, 1 => Just(0)];
    let after_us = prop_oneof![3 => Just(0), 2 => 0..2_000_u64, 1 => 0..200_000_u64];
    let lane = prop_oneof![Just(Lane::Read), Just(Lane::Write)];
    (after_us, lane, bytes).prop_map(|(after_us, lane, bytes)| Io { after_us, lane, bytes })
}

fn limit(kind: LimitKind) -> impl Strategy<Value = RateLimit> {
    let rate = if kind.counts_bytes() { (64 << 10)..(64 << 20_u64) } else { 1..5_000_u64 };
    prop_oneof![
        3 => Just(RateLimit::NONE),
        2 => rate.clone().prop_map(at_rate),
        1 => (rate, 2..9_u64, 1..20_u32).prop_map(|(rate, times, burst_seconds)| {
            RateLimit { rate, burst: rate * times, burst_seconds }
        }),
    ]
}

fn limits() -> impl Strategy<Value = VolumeLimits> {
    LimitKind::ALL.map(limit).prop_map(|limits| {
        LimitKind::ALL.into_iter().zip(limits).fold(VolumeLimits::NONE, |all, (kind, limit)| all.with(kind, limit))
    })
}

/// When each IO passed, driven as `throttle.rs` does it: at arrivals, and when something is due.
fn drive(limits: VolumeLimits, ios: &[Io]) -> Vec<Duration> {
    let mut lines: Lines<Option<usize>> = Lines::new();
    lines.set(Duration::ZERO, limits);
    let mut times = vec![None; ios.len()];
    let mut arrivals: VecDeque<(usize, Duration)> = VecDeque::new();
    let mut at = Duration::ZERO;
    for (i, io) in ios.iter().enumerate() {
        at += Duration::from_micros(io.after_us);
        arrivals.push_back((i, at));
    }
    let (mut now, mut due, mut turns) = (Duration::ZERO, None, 0);
    while !arrivals.is_empty() || due.is_some() {
        turns += 1;
        assert!(turns < 20 * ios.len() + 100, "it looks again and again and nobody passes");
        let arrival = arrivals.front().map(|(_, at)| *at);
        now = match (arrival, due) {
            (Some(arrival), Some(due)) => arrival.min(now + due),
            (Some(arrival), None) => arrival,
            (None, due) => now + due.unwrap_or_default(),
        };
        while let Some((i, _)) = arrivals.front().copied().filter(|(_, at)| *at <= now) {
            arrivals.pop_front();
            let number = lines.join(ios[i].lane, ios[i].bytes);
            *lines.waker(ios[i].lane, number).expect("it waits") = Some(i);
        }
        due = lines.advance(now, |i| times[i.expect("tagged")] = Some(now));
        assert!(due.is_none_or(|due| due > Duration::ZERO));
    }
    times.into_iter().map(|time| time.expect("everybody passes in the end")).collect()
}

fn concerns(kind: LimitKind, lane: Lane) -> bool {
    SHARED.contains(&kind) || lane.own().contains(&kind)
}

proptest! {
    /// In any window no more passes than the rate and what was saved up give; one large IO may exceed it, by debt.
    #[test]
    fn no_window_has_more_than_it_may(limits in limits(), ios in prop::collection::vec(io(), 1..120)) {
        let times = drive(limits, &ios);
        for (kind, limit) in limits.set() {
            let mut passes: Vec<(Duration, u64)> = ios.iter().zip(&times)
                .filter(|(io, _)| concerns(kind, io.lane)).map(|(io, time)| (*time, cost(kind, io.bytes))).collect();
            passes.sort();
            let meter = Meter::new(limit).expect("limited");
            for bucket in std::iter::once(meter.sustained).chain(meter.peak) {
                for (first, (from, _)) in passes.iter().enumerate() {
                    let (mut sum, mut largest) = (0, 0);
                    for (at, cost) in &passes[first..] {
                        (sum, largest) = (sum + parts(*cost), largest.max(parts(*cost)));
                        let allowed = bucket.rate * nanos(*at - *from) + bucket.capacity.max(largest);
                        prop_assert!(sum <= allowed, "{kind:?} {limit:?}: {sum} parts from {from:?} to {at:?}, {allowed} allowed");
                    }
                }
            }
        }
    }

    /// Each line is first come, first served, and nobody passes before it came.
    #[test]
    fn lines_keep_their_order(limits in limits(), ios in prop::collection::vec(io(), 1..200)) {
        let times = drive(limits, &ios);
        let mut came = Duration::ZERO;
        let mut last = [Duration::ZERO; 2];
        for (io, time) in ios.iter().zip(times) {
            came += Duration::from_micros(io.after_us);
            prop_assert!(time >= came && time >= last[io.lane as usize]);
            last[io.lane as usize] = time;
        }
    }

    /// One limit is used up while anybody waits: the last of IOs that come together passes when the rate gives it.
    #[test]
    fn nothing_is_held_back(rate in 1..10_000_u64, kind in 0..6_usize, sizes in prop::collection::vec(1..300_u64, 1..100)) {
        let kind = LimitKind::ALL[kind];
        let rate = if kind.counts_bytes() { rate * 4096 } else { rate };
        let lane = if concerns(kind, Lane::Read) { Lane::Read } else { Lane::Write };
        let ios: Vec<Io> = sizes.iter().map(|s| Io { after_us: 0, lane, bytes: s * 512 }).collect();
        let times = drive(VolumeLimits::NONE.with(kind, at_rate(rate)), &ios);
        let total: i128 = ios.iter().map(|io| parts(cost(kind, io.bytes))).sum();
        let last = times.iter().max().expect("some");
        let rounding = Duration::from_nanos(ios.len() as u64);
        prop_assert!(nanos(last.saturating_sub(rounding)) * i128::from(rate) <= total);
    }
}
