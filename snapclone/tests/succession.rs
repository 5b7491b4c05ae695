//! Runs that take over from each other: owners are suspended or dropped after any number of steps and others go on. Suspended ones wake up when
//! they are owners no more. One backup comes of it, it is whole, and nothing else is left.

mod support;

use futures_util::future::join_all;
use ogee_client::MemoryDevice;
use ogee_snapclone::{
    Backend, Index, RepoError, Repository, RunGuard, RunName, Throttle, TransferError, bury, collect, export_guarded, forget, published,
};
use std::pin::Pin;
use std::sync::Mutex;
use std::task::Poll;
use std::time::Duration;
use support::{BLOCK, device, files, open, patterned, restored, source};

/// What the MDS keeps of the task: the fence and the runs that were noted.
#[derive(Default)]
struct Journal(Mutex<(u64, Vec<RunName>)>);

impl Journal {
    /// A new owner: its fence, and the runs before it.
    fn take(&self) -> (u64, Vec<RunName>) {
        let mut state = self.0.lock().expect("lock");
        state.0 += 1;
        state.clone()
    }

    fn runs(&self) -> Vec<RunName> {
        self.0.lock().expect("lock").1.clone()
    }
}

struct Guard<'a> {
    journal: &'a Journal,
    repo: &'a Repository,
    fence: u64,
    earlier: Vec<RunName>,
    /// Asked for the fence, or trusts that it is still an owner: then only the repository decides.
    is_careful: bool,
    found: Mutex<Option<Index>>,
}

impl RunGuard for Guard<'_> {
    async fn opened(&self, run: &RunName) -> Result<(), TransferError> {
        let mut state = self.journal.0.lock().expect("lock");
        if state.0 != self.fence {
            return Err(TransferError::Withdrawn);
        }
        state.1.push(run.clone());
        Ok(())
    }

    async fn publishes(&self) -> Result<(), TransferError> {
        if self.is_careful && self.journal.0.lock().expect("lock").0 != self.fence {
            return Err(TransferError::Withdrawn);
        }
        match bury(self.repo, &self.earlier).await? {
            Some(index) => {
                *self.found.lock().expect("lock") = Some(index);
                Err(TransferError::Withdrawn)
            }
            None => Ok(()),
        }
    }
}

/// What an owner does; `None`: it was withdrawn.
async fn own(repo: &Repository, device: &MemoryDevice, journal: &Journal, is_careful: bool) -> Result<Option<Index>, TransferError> {
    let (fence, earlier) = journal.take();
    if let Some(index) = published(repo, &earlier).await? {
        return Ok(Some(index));
    }
    let guard = Guard { journal, repo, fence, earlier, is_careful, found: Mutex::default() };
    let throttle = Throttle::default();
    match export_guarded(repo, device, source(1, "s"), (&throttle, &guard), |_| ()).await {
        Ok(report) => Ok(Some(report.index)),
        Err(TransferError::Withdrawn) => Ok(guard.found.into_inner().expect("lock")),
        Err(TransferError::Repo(RepoError { kind: ogee_snapclone::RepoErrorKind::Abandoned, .. })) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lets a future run for so many polls at most; what came of it, if it was over.
async fn for_polls<T>(polls: u64, work: &mut Pin<Box<impl Future<Output = T>>>) -> Option<T> {
    let mut left = polls;
    std::future::poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        work.as_mut().poll(cx).map(Some)
    })
    .await
}

#[tokio::test]
async fn one_backup_comes_of_a_task_whoever_sleeps_or_dies() {
    let content = patterned(5 * BLOCK, 3);
    let device = device(&content);
    let mut woke_late = 0;
    for seed in 1..=40u64 {
        let folder = tempfile::tempdir().expect("a folder");
        let repo = open(Backend::directory(folder.path()), None).await.expect("opened");
        let journal = Journal::default();
        let dice = patterned(64, seed);
        let mut asleep = vec![];
        let mut results = vec![];
        for throw in dice.chunks(3).take(4) {
            let mut owner = Box::pin(own(&repo, &device, &journal, throw[0] % 2 == 0));
            match for_polls(u64::from(throw[1] % 48), &mut owner).await {
                Some(result) => results.push(result),
                // It dies, or it sleeps and knows nothing of those after it.
                None if throw[2] % 3 == 0 => drop(owner),
                None => asleep.push(owner),
            }
        }
        woke_late += asleep.len();
        let last = Box::pin(own(&repo, &device, &journal, true));
        let (slept, last) = tokio::join!(join_all(asleep), last);
        results.extend(slept);
        let last = last.expect("the last owner's repository works").expect("it is the owner until the end");
        let shown = repo.backups().await.expect("listed");
        assert_eq!(shown.len(), 1, "seed {seed}: one backup");
        assert_eq!(shown[0].as_ref().expect("whole").id, last.id, "seed {seed}");
        for index in results.into_iter().filter_map(|r| r.expect("no repository failed")) {
            assert_eq!(index.id, last.id, "seed {seed}: all who made a backup made the same");
        }
        let runs = journal.runs();
        assert_eq!(bury(&repo, &runs).await.expect("buried").map(|i| i.id), Some(last.id.clone()), "seed {seed}");
        forget(&repo, &runs).await.expect("forgotten");
        // Owners that died before they could note their run leave its record, as whoever dies does.
        let report = collect(&repo, Duration::ZERO).await.expect("collected");
        assert_eq!(report.kept_blocks, 5 + 1, "seed {seed}: the blocks and a leaf");
        assert!(restored(&repo, &last).await.expect("restored") == content, "seed {seed}");
        assert!(files(&folder.path().join("runs")).is_empty(), "seed {seed}");
    }
    assert!(woke_late > 10, "owners slept: {woke_late}");
}
