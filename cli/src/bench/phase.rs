//! Runs jobs on threads of their own and watches them.
//!
//! A phase is the filling, the load, or the reading back. Invariants: every thread has a current-thread runtime, as the
//! SDK wants it; all targets are open and all buffers made before the first IO begins; when a phase has ended no IO is in
//! flight.

use super::job::{Job, JobSpec, noise};
use super::live::{Line, Live, TICK};
use super::tally::{Tally, Window};
use super::target::{IoBuffer, Source, Target};
use crate::error::{CliError, ErrorKind};
use crate::signals::StopSignals;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ogee_common::clock::now;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// A phase that ends with its plan has no other end.
const NO_LIMIT: Duration = Duration::from_secs(365 * 86_400);

/// How long a phase takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    /// IOs before this time do not count.
    pub(crate) ramp: Duration,
    /// How long IOs count.
    pub(crate) runtime: Duration,
}

impl Timing {
    /// As long as the plans last.
    pub(crate) const SWEEP: Self = Self { ramp: Duration::ZERO, runtime: NO_LIMIT };
}

/// What a phase came to.
#[derive(Debug)]
pub(crate) struct Outcome<O> {
    /// Counts and latencies.
    pub(crate) tally: Tally,
    /// How long IOs counted, seconds.
    pub(crate) seconds: f64,
    /// What was observed at the begin and at the end of the window; absent if the load ended before.
    pub(crate) observed: Option<(O, O)>,
}

/// How a phase is run.
pub(crate) struct Phase<'a> {
    /// For the line on the terminal.
    pub(crate) what: &'static str,
    /// Whether there is none.
    pub(crate) quiet: bool,
    /// Threads that share the jobs.
    pub(crate) threads: usize,
    /// How long.
    pub(crate) timing: Timing,
    /// The wish to stop.
    pub(crate) signals: &'a mut StopSignals,
}

impl Phase<'_> {
    /// Runs the jobs. `observe` is called when the window begins and when it ends.
    ///
    /// # Errors
    /// A target or a thread could not be opened, or somebody interrupted. Failed IO is not an error here, it is counted.
    pub(crate) async fn run<S, O, F>(self, jobs: Vec<JobSpec<S>>, observe: impl Fn() -> F) -> Result<Outcome<O>, CliError>
    where
        S: Source,
        F: Future<Output = O>,
    {
        let live = Arc::new(Live::default());
        let (start, started) = watch::channel(None);
        let mut crew = Crew::start(jobs, self.threads, &live, &started)?;
        crew.ready().await?;
        let from = now() + self.timing.ramp;
        let window = Window { from, to: from + self.timing.runtime };
        start.send_replace(Some(window));
        let mut line = Line::new(self.what, self.quiet);
        let ended = crew.end();
        tokio::pin!(ended);
        let (mut first, mut last) = (None, None);
        let mut interrupted = false;
        let tally = loop {
            let next = match (&first, &last) {
                (None, _) => window.from,
                (_, None) => window.to,
                _ => window.to + NO_LIMIT,
            };
            tokio::select! {
                tally = &mut ended => break tally?,
                () = tokio::time::sleep_until(next) => {
                    if first.is_none() { first = Some(observe().await) } else { last = Some(observe().await) }
                }
                () = tokio::time::sleep(TICK) => line.show(&live),
                () = self.signals.wait() => {
                    if interrupted {
                        return Err(CliError::new(ErrorKind::Failure, "second signal: IO in flight is not waited for"));
                    }
                    interrupted = true;
                    live.stop();
                }
            }
        };
        if interrupted {
            return Err(CliError::new(ErrorKind::Failure, "interrupted"));
        }
        let seconds = window.seconds(now());
        if first.is_some() && last.is_none() {
            last = Some(observe().await);
        }
        Ok(Outcome { tally, seconds, observed: first.zip(last) })
    }
}

type Done = Result<Tally, CliError>;

/// The threads of a phase.
struct Crew {
    ready: mpsc::Receiver<()>,
    done: Vec<oneshot::Receiver<Done>>,
    threads: usize,
}

impl Crew {
    fn start<S: Source>(
        jobs: Vec<JobSpec<S>>, threads: usize, live: &Arc<Live>, started: &watch::Receiver<Option<Window>>,
    ) -> Result<Self, CliError> {
        let threads = threads.clamp(1, jobs.len().max(1));
        let mut shares: Vec<Vec<JobSpec<S>>> = std::iter::repeat_with(Vec::new).take(threads).collect();
        for (i, job) in jobs.into_iter().enumerate() {
            shares[i % threads].push(job);
        }
        let (say_ready, ready) = mpsc::channel(threads);
        let mut done = Vec::with_capacity(threads);
        for share in shares {
            let (finished, end) = oneshot::channel();
            let worker = Worker { live: live.clone(), started: started.clone(), ready: say_ready.clone() };
            let run = move || {
                // The receiver is gone only after a second signal; then nobody wants to know.
                let _ = finished.send(worker.run(share));
            };
            let spawned = std::thread::Builder::new().name("bench".to_owned()).spawn(run);
            spawned.map_err(|e| CliError::caused(ErrorKind::Failure, "start a thread", e))?;
            done.push(end);
        }
        Ok(Self { ready, done, threads })
    }

    /// Waits until every target is open; gives the error of a thread that could not.
    async fn ready(&mut self) -> Result<(), CliError> {
        for _ in 0..self.threads {
            if self.ready.recv().await.is_none() {
                // Every thread has ended or is ready, and one is missing: its error is in its result.
                break;
            }
        }
        for end in &mut self.done {
            if let Ok(Err(error)) = end.try_recv() {
                return Err(error);
            }
        }
        Ok(())
    }

    async fn end(self) -> Result<Tally, CliError> {
        let mut sum = Tally::new();
        for end in self.done {
            let panicked = |_| CliError::new(ErrorKind::Failure, "a thread of the load panicked");
            sum.merge(end.await.map_err(panicked)??);
        }
        Ok(sum)
    }
}

/// One thread.
struct Worker {
    live: Arc<Live>,
    started: watch::Receiver<Option<Window>>,
    ready: mpsc::Sender<()>,
}

impl Worker {
    fn run<S: Source>(self, specs: Vec<JobSpec<S>>) -> Done {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| CliError::caused(ErrorKind::Failure, "start the runtime", e))?;
        runtime.block_on(self.load(specs))
    }

    async fn load<S: Source>(self, specs: Vec<JobSpec<S>>) -> Done {
        let Self { live, mut started, ready } = self;
        let mut opened = Vec::with_capacity(specs.len());
        for spec in specs {
            let target = spec.source.open().await?;
            let buffers = buffers(&spec, &target)?;
            opened.push((spec, target, buffers));
        }
        // Nobody listens any more after an error of another thread; the next line ends this one too.
        let _ = ready.send(()).await;
        drop(ready);
        let window = started.wait_for(Option::is_some).await.map(|w| *w);
        let Ok(Some(window)) = window else { return Ok(Tally::new()) };
        let (jobs, buffers): (Vec<_>, Vec<_>) = opened
            .into_iter()
            .map(|(spec, target, buffers)| (Job::new(spec, target, live.clone(), window), buffers))
            .unzip();
        let slots: FuturesUnordered<_> = jobs
            .iter()
            .zip(buffers)
            .flat_map(|(job, buffers)| buffers.into_iter().map(move |buffer| job.slot(buffer)))
            .collect();
        let drivers: FuturesUnordered<_> = jobs.iter().map(|job| job.target.drive()).collect();
        tokio::select! {
            () = slots.for_each(|()| std::future::ready(())) => {}
            () = async { drivers.for_each(|()| std::future::ready(())).await; std::future::pending().await } => {}
        }
        let mut sum = Tally::new();
        for job in jobs {
            sum.merge(job.tally.into_inner());
        }
        Ok(sum)
    }
}

/// The memory of all IOs in flight of a job.
fn buffers<S: Source>(
    spec: &JobSpec<S>, target: &S::Target,
) -> Result<Vec<<S::Target as Target>::Buffer>, CliError> {
    let len = usize::try_from(spec.stride).expect("an IO is bounded by IO_BYTES_MAX") * spec.region.block_bytes;
    let one = |slot: usize| {
        let mut buffer = target.buffer(len).map_err(|e| {
            CliError::caused(ErrorKind::Failure, format!("make buffers for {}", spec.source.name()), e)
        })?;
        noise(&mut buffer, spec.seed ^ slot as u64);
        // A buffer is used from its start, and this checks that the target gave as much as was asked for.
        assert!(buffer.fill().len() >= len, "a target gave a short buffer");
        Ok(buffer)
    };
    (0..spec.depth).map(one).collect()
}

