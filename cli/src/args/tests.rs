//! Every command parses with its documented arguments, and wrong ones are refused in one sentence.

use super::*;
use clap::CommandFactory;

fn refusal(line: &str) -> String {
    let error = parse(line.split(' ')).map(|_| ()).expect_err(line);
    assert_eq!(error.kind(), ErrorKind::Usage, "{line}");
    let text = error.render(false);
    assert!(!text.contains('\n') && text.starts_with("ogee: "), "{text:?}");
    text
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn documented_commands_parse() {
    let lines = [
        "ogee dev up --dir /tmp/x --chunkservers 3 --mds 1 --json",
        "ogee dev status",
        "ogee dev down --dir /tmp/x",
        "ogee dev destroy --yes",
        "ogee status --mds a:1,b:2",
        "ogee --mds a:1 --json status",
        "ogee cluster chunkservers",
        "ogee cluster copysets --json",
        "ogee cluster pools",
        "ogee pool create default --replicas 3 --copysets 24",
        "ogee pool ls",
        "ogee image import a.qcow2 golden --size 64G --format qcow2",
        "ogee export golden@v1 out.raw",
        "ogee export golden out.qcow2 --format qcow2 --force",
        "ogee checksum golden@v1 --json",
        "ogee volume create a/b --size 10G --owner me",
        "ogee volume ls",
        "ogee volume ls a -r",
        "ogee volume ls /",
        "ogee volume info a/b",
        "ogee volume rm a/b --owner me",
        "ogee volume resize a/b --size 1.5T",
        "ogee volume rename a/b c",
        "ogee snapshot create a/b@s",
        "ogee snapshot create a/b@s c@s",
        "ogee snapshot ls a/b",
        "ogee snapshot rm a/b@s",
        "ogee clone a/b@s c",
        "ogee clone a/b c --owner me",
        "ogee rollback a/b@s --detach",
        "ogee vhost-blk a/b --socket /tmp/s --queues 2 --read-only",
        "ogee vhost-blk a/b --socket /tmp/s --steal",
        "ogee vhost-blk a/b --socket /tmp/s --upgrade --queues 4",
        "ogee vhost-blk a/b --socket /tmp/s --socket-mode 660 --socket-group root",
        "ogee libvirt-xml vm1",
        "ogee libvirt-xml a/b@s --socket /tmp/s --queues 2 --boot 2 --target vdb --device",
        "ogee libvirt-xml vm1 --domain --name web --memory 4G --vcpus 4 --virt-type qemu",
        "ogee vhost-blk --null 64G --socket /tmp/s --queues 4",
        "ogee vhost-blk serve --control /tmp/c",
        "ogee vhost-blk serve --control /tmp/c --control-group root --state /tmp/x --socket-mode 660 --socket-group root --io-timeout 9",
        "ogee vhost-blk attach a/b --control /tmp/c --socket /tmp/s --queues 2 --serial X --socket-mode 600",
        "ogee vhost-blk attach a@s --control /tmp/c --read-only --json",
        "ogee vhost-blk attach a --control /tmp/c --steal",
        "ogee vhost-blk detach a/b --control /tmp/c --force",
        "ogee vhost-blk detach --socket /tmp/s --control /tmp/c",
        "ogee vhost-blk ls --control /tmp/c --json",
        "ogee vhost-blk stats --control /tmp/c",
        "ogee vhost-blk --socket /tmp/s serve",
        "ogee vhost-blk --socket /tmp/s --queues 2 ls",
        "ogee vhost-blk help --socket /tmp/s",
        "ogee bench --vhost-socket /tmp/s --num-queues 4 --numjobs 4 --rw randread --iodepth 128",
        "ogee mds --config f",
        "ogee chunkserver --config f",
    ];
    for line in lines {
        assert!(matches!(parse(line.split(' ')), Ok(Parsed::Run(_))), "{line}");
    }
}

#[test]
fn wrong_arguments_are_named() {
    for (line, word) in [
        ("ogee", "command"),
        ("ogee volume", "command"),
        ("ogee nonsense", "nonsense"),
        ("ogee volume create a", "--size"),
        ("ogee volume create a@b --size 1G", "not volume@snapshot"),
        ("ogee volume create a b --size 1G", "'b'"),
        ("ogee volume create a --size 1Q", "1Q"),
        ("ogee volume create a --size 100", "1 MiB to 64 TiB"),
        ("ogee snapshot create a", "volume@snapshot"),
        ("ogee snapshot create a@s b", "volume@snapshot"),
        ("ogee snapshot create", "VOLUME@SNAPSHOT"),
        ("ogee rollback a", "volume@snapshot"),
        ("ogee volume info ..", "are not names"),
        ("ogee dev up --mds 2", "1, 3 or 5"),
        ("ogee dev up --chunkservers 0", "0"),
        ("ogee dev destroy", "--yes"),
        ("ogee image import a b --format vmdk", "vmdk"),
        ("ogee vhost-blk a", "--socket"),
        ("ogee vhost-blk --socket s", "VOLUME"),
        ("ogee vhost-blk", "--socket"),
        ("ogee vhost-blk serve", "--control"),
        ("ogee vhost-blk attach --control c", "VOLUME"),
        ("ogee vhost-blk attach a --control c --steal --read-only", "--read-only"),
        ("ogee vhost-blk detach --control c", "VOLUME"),
        ("ogee vhost-blk detach a --socket s --control c", "--socket"),
        ("ogee vhost-blk ls", "--control"),
        ("ogee vhost-blk --socket s --null 5000", "multiple of 4096"),
        ("ogee vhost-blk a --socket s --null 1G", "--null"),
        ("ogee bench a --vhost-socket s", "--vhost-socket"),
        ("ogee bench --vhost-socket s --num-queues 65", "65"),
        ("ogee vhost-blk a --socket s --steal --read-only", "--read-only"),
        ("ogee vhost-blk a --socket s --socket-mode 888", "octal"),
        ("ogee vhost-blk a --socket s --socket-group no-such-group", "no-such-group"),
        ("ogee libvirt-xml", "VOLUME"),
        ("ogee libvirt-xml a --queues 65", "65"),
        ("ogee libvirt-xml a --boot 0", "0"),
        ("ogee libvirt-xml a --memory 1M", "32 MiB"),
        ("ogee libvirt-xml a --vcpus 4", "--domain"),
        ("ogee libvirt-xml a --domain --device", "--device"),
        ("ogee mds", "--config"),
    ] {
        let text = refusal(line);
        assert!(text.contains(word), "{line}: {text}");
    }
}

#[test]
fn every_command_has_an_example_or_subcommands_and_exit_codes_are_documented() {
    let Ok(Parsed::Show(help)) = parse(["ogee", "--help"]) else { panic!("help is shown") };
    for kind in [
        ErrorKind::Failure,
        ErrorKind::Usage,
        ErrorKind::NotFound,
        ErrorKind::Conflict,
        ErrorKind::Unavailable,
        ErrorKind::NoSpace,
    ] {
        assert!(help.contains(&format!("\n  {}  ", kind.exit_code())), "{kind:?} is missing in:\n{help}");
    }
    let command = Cli::command();
    for sub in command.get_subcommands() {
        assert!(sub.get_about().is_some(), "{} says what it does", sub.get_name());
        let has_example = sub.get_after_help().is_some_and(|h| h.to_string().contains("Example"));
        assert!(has_example || sub.has_subcommands(), "{} has no example", sub.get_name());
    }
}
