//! Service tasks over gRPC: two takers at once, an owner that falls silent, a leader that dies, every refusal.

mod cluster;

use cluster::{Client, Cluster, kind, now, poll, refused};
use ogee_common::limits::{SERVICE_TASK_LEASE, SERVICE_TASK_RENEW};
use ogee_proto::MdsErrorKind as K;
use ogee_proto::mds::{self as m};

fn new_task(key: u8) -> m::CreateServiceTaskRequest {
    let key = if key == 0 { vec![] } else { vec![key; 16] };
    m::CreateServiceTaskRequest { kind: "backup".into(), repository: "main".into(), arguments: "{}".into(), key: key.into() }
}

fn wish(owner: u64) -> m::TakeServiceTaskRequest {
    m::TakeServiceTaskRequest { owner, kinds: vec!["backup".into()], repositories: vec!["main".into()] }
}

async fn take(c: &mut Client, owner: u64) -> Option<m::ServiceTask> {
    c.take_service_task(wish(owner)).await.expect("an answer").into_inner().task
}

fn holder(task: &m::ServiceTask) -> Option<m::TaskHolder> {
    Some(m::TaskHolder { id: task.id, owner: task.owner, fence: task.fence })
}

fn renewal(task: &m::ServiceTask, done: u64) -> m::RenewServiceTaskRequest {
    m::RenewServiceTaskRequest { holder: holder(task), done, total: 10 }
}

fn note(task: &m::ServiceTask, note: &str) -> m::NoteServiceTaskRequest {
    m::NoteServiceTaskRequest { holder: holder(task), note: note.into(), done: 1, total: 10 }
}

fn end(task: &m::ServiceTask, end: &str) -> m::EndServiceTaskRequest {
    m::EndServiceTaskRequest { holder: holder(task), end: end.into(), result: "r".into() }
}

#[tokio::test]
async fn a_task_has_one_owner_until_it_falls_silent() {
    let cluster = Cluster::start(1);
    let (_, mut c) = cluster.leader().await;
    let made = c.create_service_task(new_task(1)).await.expect("made").into_inner();
    let again = c.create_service_task(new_task(1)).await.expect("the same").into_inner();
    assert_eq!((made.id, &made.state[..]), (again.id, "queued"));
    let first = take(&mut c, 5).await.expect("a task");
    assert_eq!((first.id, first.fence, &first.state[..]), (made.id, 1, "running"));
    assert_eq!(take(&mut c, 6).await, None, "it is somebody's");
    c.note_service_task(note(&first, "begun")).await.expect("noted");
    let renewed = c.renew_service_task(renewal(&first, 3)).await.expect("renewed").into_inner();
    assert_eq!((renewed.done, renewed.total), (3, 10));
    // As long as it renews nobody else gets it, however long that takes.
    let began = now();
    while began.elapsed() < SERVICE_TASK_LEASE + SERVICE_TASK_RENEW {
        c.renew_service_task(renewal(&first, 4)).await.expect("renewed");
        tokio::time::sleep(SERVICE_TASK_RENEW / 4).await;
        c.renew_service_task(renewal(&first, 4)).await.expect("renewed");
        assert_eq!(take(&mut c, 6).await, None, "it is renewed");
    }
    let second = poll("the lease to lapse", || {
        let mut c = c.clone();
        async move { take(&mut c, 6).await }
    });
    let second = second.await;
    assert_eq!((second.fence, &second.note[..], second.done), (2, "begun", 1), "it knows what the first one noted");
    assert_eq!(refused(c.renew_service_task(renewal(&first, 5)).await).0, K::Fenced);
    assert_eq!(refused(c.note_service_task(note(&first, "late")).await).0, K::Fenced);
    assert_eq!(refused(c.end_service_task(end(&first, "done")).await).0, K::Fenced);
    c.end_service_task(end(&second, "done")).await.expect("done");
    let done = c.end_service_task(end(&second, "done")).await.expect("a repetition is no error").into_inner();
    assert_eq!((&done.state[..], &done.note[..], &done.result[..]), ("done", "begun", "r"));
    assert_eq!(refused(c.renew_service_task(renewal(&second, 5)).await).0, K::Fenced);
}

#[tokio::test]
async fn what_is_given_back_is_taken_at_once_and_what_is_cancelled_is_undone_first() {
    let cluster = Cluster::start(1);
    let (_, mut c) = cluster.leader().await;
    let id = c.create_service_task(new_task(0)).await.expect("made").into_inner().id;
    let first = take(&mut c, 5).await.expect("a task");
    c.end_service_task(end(&first, "released")).await.expect("given back");
    let second = take(&mut c, 6).await.expect("at once");
    assert_eq!(second.fence, 2);
    assert_eq!(refused(c.end_service_task(end(&second, "cancelled")).await).0, K::InvalidArgument, "nobody wished it");
    let wished = c.cancel_service_task(m::ServiceTaskRequest { id }).await.expect("wished").into_inner();
    assert_eq!(wished.state, "cancelling");
    assert_eq!(c.renew_service_task(renewal(&second, 0)).await.expect("still its").into_inner().state, "cancelling");
    c.end_service_task(end(&second, "cancelled")).await.expect("undone");
    let never = c.create_service_task(new_task(0)).await.expect("made").into_inner().id;
    let wished = c.cancel_service_task(m::ServiceTaskRequest { id: never }).await.expect("wished").into_inner();
    assert_eq!(wished.state, "cancelled", "nothing was begun");
    let page = m::ListServiceTasksRequest { start_after: 0, limit: 1, open: false };
    let page = c.list_service_tasks(page).await.expect("a page").into_inner();
    assert_eq!((page.tasks.len(), page.tasks[0].id, page.more), (1, id, true));
    let open = m::ListServiceTasksRequest { start_after: 0, limit: 0, open: true };
    assert!(c.list_service_tasks(open).await.expect("a page").into_inner().tasks.is_empty());
}

#[tokio::test]
async fn wrong_calls_are_refused() {
    let cluster = Cluster::start(1);
    let (_, mut c) = cluster.leader().await;
    let made = c.create_service_task(new_task(1)).await.expect("made").into_inner();
    let other = m::CreateServiceTaskRequest { arguments: "{1}".into(), ..new_task(1) };
    assert_eq!(refused(c.create_service_task(other).await).0, K::AlreadyExists);
    let long = m::CreateServiceTaskRequest { arguments: "x".repeat(4097), ..new_task(0) };
    assert_eq!(refused(c.create_service_task(long).await).0, K::InvalidArgument);
    let nameless = m::CreateServiceTaskRequest { kind: "a b".into(), ..new_task(0) };
    assert_eq!(refused(c.create_service_task(nameless).await).0, K::InvalidArgument);
    let short = m::CreateServiceTaskRequest { key: vec![1; 15].into(), ..new_task(0) };
    assert_eq!(refused(c.create_service_task(short).await).0, K::InvalidArgument);
    assert_eq!(refused(c.stat_service_task(m::ServiceTaskRequest { id: 99 }).await).0, K::NotFound);
    assert_eq!(refused(c.take_service_task(wish(0)).await).0, K::InvalidArgument);
    let many = m::TakeServiceTaskRequest { kinds: vec!["x".into(); 65], ..wish(1) };
    assert_eq!(refused(c.take_service_task(many).await).0, K::Limit);
    for stranger in [
        m::TakeServiceTaskRequest { kinds: vec!["restore".into()], ..wish(1) },
        m::TakeServiceTaskRequest { repositories: vec!["other".into()], ..wish(1) },
    ] {
        assert_eq!(c.take_service_task(stranger).await.expect("an answer").into_inner().task, None);
    }
    let nobody = m::RenewServiceTaskRequest { holder: None, done: 0, total: 0 };
    assert_eq!(refused(c.renew_service_task(nobody).await).0, K::InvalidArgument);
    let taken = take(&mut c, 5).await.expect("a task");
    assert_eq!(taken.id, made.id);
    assert_eq!(refused(c.end_service_task(end(&taken, "eaten")).await).0, K::InvalidArgument);
}

#[tokio::test]
async fn an_owner_keeps_its_task_when_the_leader_dies() {
    let mut cluster = Cluster::start(3);
    let (leader, mut c) = cluster.leader().await;
    c.create_service_task(new_task(1)).await.expect("made");
    let first = take(&mut c, 5).await.expect("a task");
    cluster.nodes[leader].kill();
    let (_, mut c) = cluster.leader().await;
    assert_eq!(take(&mut c, 6).await, None, "the new leader has not had the time to hear of the owner");
    c.renew_service_task(renewal(&first, 7)).await.expect("renewed");
    let open = m::ListServiceTasksRequest { start_after: 0, limit: 0, open: true };
    let list = c.list_service_tasks(open).await.expect("a page").into_inner();
    assert_eq!((list.tasks.len(), list.tasks[0].done), (1, 7));
    let second = poll("the lease to lapse", || {
        let mut c = c.clone();
        async move { take(&mut c, 6).await }
    });
    assert_eq!(second.await.fence, 2);
    let late = c.note_service_task(note(&first, "late")).await.expect_err("fenced");
    assert_eq!(kind(&late), Some(K::Fenced));
}
