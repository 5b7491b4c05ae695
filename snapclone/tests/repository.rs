//! The repository in a directory: backups come back, share what is equal, survive interruption and collection, and
//! damage is never returned as data. The same over S3 is in `s3.rs`.

mod support;

use ogee_client::{BlockDevice, MemoryDevice};
use ogee_snapclone::{Backend, KeyFile, OpenOptions, RepoErrorKind, Repository, Throttle, collect, export, restore, verify};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;
use support::{BLOCK, back_up, content, device, files, open, patterned, random_page_changes, restored, source};

/// What becomes of an object; the second is another object of its kind.
type Damage = fn(&[u8], &[u8]) -> Option<Vec<u8>>;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

async fn repository(folder: &Path, key: Option<[u8; 32]>) -> Repository {
    open(Backend::directory(folder), key).await.expect("opened")
}

/// Lets a future run for so many polls at most; `None` if it was not over.
async fn for_polls<T>(polls: usize, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
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
async fn backups_come_back_share_blocks_and_skip_zeros() {
    for key in [None, Some([3; 32])] {
        let folder = folder();
        let repo = repository(folder.path(), key).await;
        support::whole_life(&repo).await;
    }
}

#[tokio::test]
async fn an_encrypted_repository_shows_no_content_and_wants_its_key() {
    let folder = folder();
    let repo = repository(folder.path(), Some([3; 32])).await;
    let secret = b"a secret that is written down many times. ".repeat(20_000);
    let mut bytes = secret[..3 * BLOCK].to_vec();
    bytes[2 * BLOCK..].fill(7);
    back_up(&repo, &device(&bytes), 1, "s").await;
    for (path, object) in files(folder.path()) {
        assert!(!object.windows(8).any(|w| w == b"a secret"), "{}", path.display());
    }
    for key in [None, Some([4; 32])] {
        let error = open(Backend::directory(folder.path()), key).await.expect_err("refused");
        assert_eq!(error.kind, RepoErrorKind::WrongKey);
    }
    let plain = folder.path().join("plain");
    repository(&plain, None).await;
    let error = open(Backend::directory(&plain), Some([3; 32])).await.expect_err("refused");
    assert_eq!(error.kind, RepoErrorKind::WrongKey);
    let missing = Repository::open(Backend::directory(&folder.path().join("none")), OpenOptions::default()).await;
    assert_eq!(missing.expect_err("there is none").kind, RepoErrorKind::NotFound);
    let bad_key = folder.path().join("key");
    std::fs::write(&bad_key, "12345").expect("written");
    assert_eq!(KeyFile::read(&bad_key).expect_err("no key").kind, RepoErrorKind::WrongKey);
}

/// Every object of a repository, cut short, changed, emptied, exchanged or deleted: a restore fails or is right.
#[tokio::test]
async fn damage_is_never_returned_as_data() {
    for key in [None, Some([3; 32])] {
        let folder = folder();
        let repo = repository(folder.path(), key).await;
        let bytes = patterned(3 * BLOCK + 8192, 1);
        let id = back_up(&repo, &device(&bytes), 1, "s").await.index.id;
        let objects = files(folder.path());
        assert_eq!(objects.len(), 1 + 1 + 4 + 1, "description, index, blocks, leaf");
        let damage: [Damage; 6] = [
            |o, _| Some(o[..o.len() / 2].to_vec()),
            |_, _| Some(vec![]),
            |o, _| Some([o, b"x"].concat()),
            |o, _| {
                let mut changed = o.to_vec();
                changed[o.len() * 3 / 4] ^= 4;
                Some(changed)
            },
            |_, other| Some(other.to_vec()),
            |_, _| None,
        ];
        for (i, (path, object)) in objects.iter().enumerate() {
            for change in damage {
                match change(object, &objects[(i + 1) % objects.len()].1) {
                    Some(changed) => std::fs::write(path, changed).expect("written"),
                    None => std::fs::remove_file(path).expect("deleted"),
                }
                let right = match open(Backend::directory(folder.path()), key).await {
                    Ok(repo) => match repo.find(&id).await {
                        Ok(index) => restored(&repo, &index).await.map(|found| assert!(found == bytes)).is_ok(),
                        Err(_) => false,
                    },
                    Err(_) => false,
                };
                // Changed words of the description may not matter; nothing else may be unnoticed.
                assert!(!right || path.ends_with("repository.json"), "{}", path.display());
                std::fs::write(path, object).expect("mended");
            }
        }
        let block = objects.iter().find(|(p, _)| p.starts_with(folder.path().join("blocks"))).expect("a block");
        std::fs::write(&block.0, b"OGEB").expect("written");
        let index = repo.find(&id).await.expect("there");
        let report = verify(&repo, &index, 1, |_| ()).await.expect("read");
        assert_eq!((report.damaged, report.damage.len()), (1, 1), "{report:?}");
        assert!(collect(&repo, Duration::ZERO).await.is_err() || report.blocks == 5, "a damaged leaf stops collection");
    }
}

/// An export is dropped after any number of steps: the next backup goes on from there, and nothing is left over.
#[tokio::test]
async fn an_interrupted_backup_is_gone_on_with_and_leaks_nothing() {
    let folder = folder();
    let bytes = patterned(40 * BLOCK, 5);
    let (mut polls, mut interrupted) = (1, 0);
    loop {
        let root = folder.path().join(polls.to_string());
        let repo = repository(&root, None).await;
        let source_ = source(1, "s");
        let (device_, throttle) = (device(&bytes), Throttle::default());
        let done = for_polls(polls, Box::pin(export(&repo, &device_, source_, &throttle, |_| ()))).await;
        if done.is_some() {
            break;
        }
        interrupted += 1;
        let stored = files(&root.join("blocks")).len() as u64;
        // Half of the time nobody goes on with it.
        let index = if polls % 2 == 0 {
            let report = back_up(&repo, &device_, 1, "s").await;
            // A thread that was packing when the run died may have stored a few more, or fewer than were counted.
            assert!(report.new_blocks <= 41 - stored.min(41) + 16, "{stored} were there, {} stored", report.new_blocks);
            Some(report.index)
        } else {
            None
        };
        wait_until_quiet(&root).await;
        collect(&repo, Duration::ZERO).await.expect("collected");
        match &index {
            Some(index) => {
                assert!(restored(&repo, index).await.expect("restored") == bytes);
                assert_eq!(files(&root.join("blocks")).len(), 41);
            }
            None => {
                // A thread that had the index already when the run was dropped has published it: then it is a whole backup.
                let published = repo.backups().await.expect("listed").len();
                assert!(published <= 1);
                assert_eq!(files(&root.join("blocks")).len(), 41 * published, "{published} published after {polls} polls");
            }
        }
        assert_eq!((files(&root.join("runs")).len(), files(&root.join("tmp")).len()), (0, 0), "after {polls} polls");
        polls += 1 + polls / 6;
    }
    assert!(interrupted > 5, "only {interrupted} interruptions");
}

/// Threads of a dropped export may still be writing.
async fn wait_until_quiet(root: &Path) {
    let names = || files(root).into_iter().map(|(p, _)| p).collect::<Vec<PathBuf>>();
    let mut before = names();
    loop {
        // All blocking work that was queued is done before this is.
        for _ in 0..4 {
            tokio::task::spawn_blocking(|| ()).await.expect("ran");
        }
        let after = names();
        if before == after && files(&root.join("tmp")).is_empty() {
            return;
        }
        before = after;
    }
}

/// Collection is dropped after any number of steps, beside a backup under way; at the end all that shows is whole.
#[tokio::test]
async fn collection_may_die_anywhere_and_run_beside_backups() {
    let folder = folder();
    let repo = repository(folder.path(), None).await;
    let mut bytes = patterned(20 * BLOCK, 9);
    let mut kept = vec![(back_up(&repo, &device(&bytes), 1, "s0").await.index, bytes.clone())];
    for round in 1..24u8 {
        random_page_changes(&mut bytes, 5, u64::from(round));
        let device_ = device(&bytes);
        // A run that has begun, and takes its time: it may refer to a backup that is removed meanwhile.
        let throttle = Throttle::default();
        let name = format!("s{round}");
        let slow = export(&repo, &device_, source(1, &name), &throttle, |_| ());
        let mut slow = pin!(slow);
        let started = for_polls(usize::from(round) * 3, slow.as_mut()).await;
        let (old, _) = kept.remove(0);
        repo.remove(old.backup_id()).await.expect("removed");
        assert!(for_polls(usize::from(round) * 2, Box::pin(collect(&repo, Duration::from_secs(3600)))).await.is_none_or(|c| c.is_ok()));
        collect(&repo, Duration::from_secs(3600)).await.expect("collected");
        let report = match started {
            Some(done) => done,
            None => slow.await,
        };
        kept.push((report.expect("backed up").index, bytes.clone()));
        if round % 3 == 0 {
            let extra = back_up(&repo, &device_, 2, "other").await;
            kept.push((extra.index, bytes.clone()));
        }
        for (index, content) in &kept {
            assert!(restored(&repo, index).await.expect("restored") == *content, "round {round}");
        }
    }
    for (index, _) in &kept {
        repo.remove(index.backup_id()).await.expect("removed");
    }
    wait_until_quiet(folder.path()).await;
    collect(&repo, Duration::ZERO).await.expect("collected");
    let left: Vec<_> = files(folder.path()).into_iter().map(|(p, _)| p).collect();
    assert_eq!(left, [folder.path().join("repository.json")]);
}

/// A backup that slept while collection gave it up cannot publish.
#[tokio::test]
async fn a_run_that_was_given_up_never_shows() {
    let folder = folder();
    let repo = repository(folder.path(), None).await;
    let bytes = patterned(8 * BLOCK, 2);
    let device_ = device(&bytes);
    let throttle = Throttle::default();
    let sleeper = export(&repo, &device_, source(1, "s"), &throttle, |_| ());
    let mut sleeper = pin!(sleeper);
    let mut polls = 0;
    while files(&folder.path().join("blocks")).is_empty() {
        assert!(for_polls(1, sleeper.as_mut()).await.is_none(), "it was over at once");
        tokio::task::spawn_blocking(|| ()).await.expect("ran");
        polls += 1;
        assert!(polls < 10_000);
    }
    let report = collect(&repo, Duration::ZERO).await.expect("collected");
    assert_eq!(report.runs_given_up, 1);
    match sleeper.await {
        Err(ogee_snapclone::TransferError::Repo(e)) => {
            // Its temporary files may have been swept under it, too.
            assert!(matches!(e.kind, RepoErrorKind::Abandoned | RepoErrorKind::NotFound), "{e:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(repo.backups().await.expect("listed").is_empty());
    collect(&repo, Duration::ZERO).await.expect("collected");
    assert!(files(&folder.path().join("blocks")).is_empty());
    let index = back_up(&repo, &device_, 1, "s").await.index;
    assert!(restored(&repo, &index).await.expect("restored") == bytes);
}

/// Two backups of one volume at once are both whole, and neither is the other.
#[tokio::test]
async fn two_runs_at_once_do_not_disturb_each_other() {
    let folder = folder();
    let repo = repository(folder.path(), None).await;
    let (a, b) = (patterned(30 * BLOCK, 1), patterned(30 * BLOCK, 2));
    let (da, db) = (device(&a), device(&b));
    let (ra, rb) = tokio::join!(back_up(&repo, &da, 1, "a"), back_up(&repo, &db, 1, "b"));
    assert_ne!(ra.index.id, rb.index.id);
    collect(&repo, Duration::ZERO).await.expect("collected");
    assert!(restored(&repo, &ra.index).await.expect("restored") == a);
    assert!(restored(&repo, &rb.index).await.expect("restored") == b);
}

/// What an older program wrote is read by this one: `tests/golden` is two repositories, one of them encrypted.
#[tokio::test]
async fn golden_repositories_are_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let bytes = content(300 * BLOCK + 4096, |i| if i / BLOCK % 100 == 7 { u8::try_from(i / 512 % 7).expect("small") } else { 0 });
    for (name, key) in [("plain", None), ("encrypted", Some([3; 32]))] {
        let root = golden.join(name);
        if std::env::var_os("OGEE_BLESS").is_some() {
            let _ = std::fs::remove_dir_all(&root);
            let repo = repository(&root, key).await;
            back_up(&repo, &device(&bytes), 1, "s").await;
        }
        let options = OpenOptions { key: key.map(|k| KeyFile::new(&k)), ..OpenOptions::default() };
        let repo = Repository::open(Backend::directory(&root), options).await.expect("opened");
        let index = repo.find("vms/1@s").await.expect("there");
        assert_eq!(index.data_bytes, 3 * BLOCK as u64);
        assert!(restored(&repo, &index).await.expect("restored") == bytes);
        // What this program writes for the same content has the same addresses.
        let folder = folder();
        let again = back_up(&repository(folder.path(), key).await, &device(&bytes), 1, "s").await;
        assert_eq!(again.index.root, index.root, "{name}");
    }
}

#[tokio::test]
async fn a_volume_that_is_too_small_is_refused() {
    let folder = folder();
    let repo = repository(folder.path(), None).await;
    let index = back_up(&repo, &device(&patterned(2 * BLOCK, 1)), 1, "s").await.index;
    let small = MemoryDevice::new(BLOCK);
    let refused = restore(&repo, &index, &small, &Throttle::default(), |_| ()).await;
    assert!(refused.expect_err("refused").to_string().contains("smaller"));
    assert_eq!(small.info().size_bytes, BLOCK as u64);
}
