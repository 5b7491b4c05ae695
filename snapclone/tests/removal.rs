//! Removals beside lazy restores: whichever order they come in, no volume is kept on a backup that goes.

mod support;

use ogee_snapclone::{Backend, BackupId, RepoErrorKind, Repository, collect};
use std::cell::Cell;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;
use support::{BLOCK, back_up, device, files, open, patterned};

const HOUR: Duration = Duration::from_secs(3600);

async fn repository(folder: &Path) -> Repository {
    open(Backend::directory(folder), None).await.expect("opened")
}

async fn backup(repo: &Repository, name: &str) -> BackupId {
    back_up(repo, &device(&patterned(2 * BLOCK, 1)), 1, name).await.index.backup_id()
}

async fn shows(repo: &Repository, id: BackupId) -> bool {
    repo.find(&id.to_string()).await.is_ok()
}

/// Lets a future run for so many polls at most; `None` if it was not over.
async fn for_polls<T>(polls: usize, mut work: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
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

/// Removals leave nothing behind when their backup was collected.
async fn leaves_nothing(repo: &Repository, folder: &Path) {
    for _ in 0..2 {
        collect(repo, Duration::ZERO).await.expect("collected");
    }
    let left: Vec<_> = files(&folder.join("removals")).into_iter().map(|(path, _)| path).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(start_paused = true)]
async fn a_backup_that_is_being_removed_is_refused_until_that_is_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let repo = repository(folder.path()).await;
    let id = backup(&repo, "s").await;
    repo.refuse_removed(id).await.expect("nobody removes it");
    let first = repo.begin_removal(id).await.expect("begun");
    let second = repo.begin_removal(id).await.expect("begun, too");
    first.take_back().await.expect("taken back");
    let error = repo.refuse_removed(id).await.expect_err("the second one is under way");
    assert_eq!(error.kind, RepoErrorKind::Abandoned, "{error}");
    let (taken_back, waited) = tokio::join!(second.take_back(), repo.refuse_removed(id));
    taken_back.expect("taken back");
    waited.expect("it was waited for");
    assert!(shows(&repo, id).await);
    repo.remove(id).await.expect("removed");
    assert_eq!(repo.refuse_removed(id).await.expect_err("removed").kind, RepoErrorKind::NotFound);
    assert_eq!(repo.begin_removal(id).await.expect_err("removed").kind, RepoErrorKind::NotFound);
    leaves_nothing(&repo, folder.path()).await;
    assert_eq!(repo.refuse_removed(id).await.expect_err("collected").kind, RepoErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_slept_removes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let repo = repository(folder.path()).await;
    let id = backup(&repo, "s").await;
    let sleeps = repo.begin_removal(id).await.expect("begun");
    assert_eq!(collect(&repo, HOUR).await.expect("collected").removals_given_up, 0, "it is young");
    assert_eq!(collect(&repo, Duration::ZERO).await.expect("collected").removals_given_up, 1);
    repo.refuse_removed(id).await.expect("a volume may stand on it");
    assert_eq!(sleeps.carry_out().await.expect_err("given up").kind, RepoErrorKind::Abandoned);
    assert!(shows(&repo, id).await);
    repo.remove(id).await.expect("removed");
    leaves_nothing(&repo, folder.path()).await;
}

#[tokio::test(start_paused = true)]
async fn a_removal_may_die_anywhere() {
    let folder = tempfile::tempdir().expect("a folder");
    let repo = repository(folder.path()).await;
    let (mut kept, mut gone) = (0, 0);
    for polls in 0.. {
        let id = backup(&repo, &format!("s{polls}")).await;
        let over = {
            let mut remove = pin!(repo.remove(id));
            for_polls(polls, remove.as_mut()).await.is_some()
        };
        // What a thread was about to do is done, as by a remover that had sent it.
        for _ in 0..4 {
            tokio::task::spawn_blocking(|| ()).await.expect("ran");
        }
        let stands = repo.refuse_removed(id).await.is_ok();
        collect(&repo, Duration::ZERO).await.expect("collected");
        match repo.refuse_removed(id).await {
            Ok(()) => kept += 1,
            Err(e) => {
                assert_eq!(e.kind, RepoErrorKind::NotFound, "a collection decides");
                assert!(!stands, "{polls}: a volume was kept on a backup that goes");
                gone += 1;
            }
        }
        if over {
            assert!(!shows(&repo, id).await);
            break;
        }
        if shows(&repo, id).await {
            repo.remove(id).await.expect("removed");
        }
    }
    assert!(kept > 0 && gone > 0, "{kept} kept, {gone} gone");
    leaves_nothing(&repo, folder.path()).await;
}

/// A cluster of one bit: whether a volume stands on the backup.
async fn remover(repo: &Repository, id: BackupId, stands: &Cell<bool>) -> bool {
    let removal = repo.begin_removal(id).await.expect("begun");
    tokio::task::yield_now().await;
    if stands.get() {
        removal.take_back().await.expect("taken back");
        return false;
    }
    tokio::task::yield_now().await;
    removal.carry_out().await.expect("carried out");
    true
}

async fn restorer(repo: &Repository, id: BackupId, stands: &Cell<bool>) -> bool {
    if !shows(repo, id).await {
        return false;
    }
    tokio::task::yield_now().await;
    stands.set(true);
    tokio::task::yield_now().await;
    let kept = repo.refuse_removed(id).await.is_ok();
    stands.set(kept);
    kept
}

#[tokio::test(start_paused = true)]
async fn a_removal_and_a_lazy_restore_never_both_succeed() {
    let folder = tempfile::tempdir().expect("a folder");
    let repo = repository(folder.path()).await;
    let (mut removed_some, mut kept_some) = (false, false);
    for polls in 0..60 {
        for restorer_first in [false, true] {
            let id = backup(&repo, "s").await;
            let stands = Cell::new(false);
            let (mut remove, mut restore) = (pin!(remover(&repo, id, &stands)), pin!(restorer(&repo, id, &stands)));
            // One begins, the other comes to its end meanwhile or waits for the first.
            let (removed, kept) = if restorer_first {
                match for_polls(polls, restore.as_mut()).await {
                    Some(kept) => (remove.await, kept),
                    None => tokio::join!(remove, restore),
                }
            } else {
                match for_polls(polls, remove.as_mut()).await {
                    // The restorer found the backup before that.
                    Some(removed) => {
                        stands.set(true);
                        let kept = repo.refuse_removed(id).await.is_ok();
                        (removed, kept)
                    }
                    None => tokio::join!(remove, restore),
                }
            };
            assert!(!(removed && kept), "{polls}");
            (removed_some, kept_some) = (removed_some || removed, kept_some || kept);
            if !removed {
                repo.remove(id).await.expect("removed");
            }
        }
    }
    assert!(removed_some && kept_some);
    leaves_nothing(&repo, folder.path()).await;
}
