use super::*;
use ipc::graph::IoType;
use ipc::objects::Scalar;

fn json(text: &str) -> Result<NodeOptions, String> {
    let options: FlatOptions = serde_json::from_str(text).unwrap();
    NodeOptions::parse(options).map_err(|error| error.to_string())
}

fn keys(text: &str) -> Result<NodeOptions, String> {
    let pairs = text.split(',').map(|pair| {
        let (name, value) = pair.split_once('=').unwrap();
        (name.to_owned(), Scalar::Text(value.to_owned()))
    });
    NodeOptions::parse(FlatOptions(pairs.collect())).map_err(|error| error.to_string())
}

#[test]
fn keys_and_json_say_the_same() {
    for (text, object) in [
        (
            "driver=raw,node-name=n,offset=1k,size=64k,file.driver=file,file.filename=a,file.aio=io_uring",
            r#"{"driver":"raw","node-name":"n","offset":1024,"size":65536,
                "file":{"driver":"file","filename":"a","aio":"io_uring"}}"#,
        ),
        (
            "driver=qcow2,file=f,backing=,cache.direct=on,lazy-refcounts=on,l2-cache-size=1M,discard=unmap,detect-zeroes=unmap",
            r#"{"driver":"qcow2","file":"f","backing":null,"cache":{"direct":true},"lazy-refcounts":true,
                "l2-cache-size":1048576,"discard":"unmap","detect-zeroes":"unmap"}"#,
        ),
        (
            "driver=blkdebug,image=f,inject-error.0.event=l2_load,inject-error.0.once=on,inject-error.0.sector=8,set-state.0.event=read_aio,set-state.0.new_state=2",
            r#"{"driver":"blkdebug","image":"f","inject-error":[{"event":"l2_load","once":true,"sector":8}],
                "set-state":[{"event":"read_aio","new_state":2}]}"#,
        ),
        (
            "driver=null-co,size=1G,latency-ns=5,read-zeroes=on,read-only=on,force-share=on",
            r#"{"driver":"null-co","size":1073741824,"latency-ns":5,"read-zeroes":true,"read-only":true,"force-share":true}"#,
        ),
    ] {
        assert_eq!(keys(text).unwrap(), json(object).unwrap(), "{text}");
    }
}

#[test]
fn rules_of_blkdebug_are_read() {
    let node = json(
        r#"{"driver":"blkdebug","image":"f","align":4096,"inject-error":[
            {"event":"none","errno":28,"iotype":"write","immediately":true},{"event":"read_aio","state":3}]}"#,
    )
    .unwrap();
    let DriverOptions::Blkdebug(options) = node.driver else {
        panic!("{node:?}")
    };
    assert_eq!(options.align, Some(4096));
    let [first, second] = &options.inject_errors[..] else {
        panic!("{options:?}")
    };
    assert_eq!(
        (first.event.as_deref(), first.errno, first.offset, first.immediately),
        (None, 28, None, true)
    );
    assert_eq!(first.iotypes, [IoType::Write]);
    assert_eq!(
        (second.event.as_deref(), second.errno, second.state),
        (Some("read_aio"), 5, Some(3))
    );
    assert_eq!(second.iotypes.len(), 5);
}

#[test]
fn backing_has_four_forms() {
    let backing = |text: &str| match json(text).unwrap().driver {
        DriverOptions::Qcow2(options) => options.backing,
        other => panic!("{other:?}"),
    };
    assert_eq!(backing(r#"{"driver":"qcow2","file":"f"}"#), BackingOptions::FromImage);
    assert_eq!(
        backing(r#"{"driver":"qcow2","file":"f","backing":null}"#),
        BackingOptions::None
    );
    assert_eq!(
        backing(r#"{"driver":"qcow2","file":"f","backing":"b"}"#),
        BackingOptions::Node(ChildOptions::Reference("b".into()))
    );
    let inline = backing(r#"{"driver":"qcow2","file":"f","backing":{"driver":"null-co","node-name":"z"}}"#);
    let BackingOptions::Node(ChildOptions::Inline(node)) = inline else {
        panic!("{inline:?}")
    };
    assert_eq!(node.name.as_deref(), Some("z"));
}

#[test]
fn references_and_nodes_of_a_tree_are_found() {
    let node = json(
        r#"{"driver":"qcow2","node-name":"top","file":{"driver":"raw","node-name":"r","file":"f"},
            "backing":{"driver":"qcow2","file":"g","backing":"h"}}"#,
    )
    .unwrap();
    assert_eq!(node.references(), ["f", "g", "h"]);
    let names: Vec<_> = node.nodes().iter().map(|node| node.name.as_deref()).collect();
    assert_eq!(names, [Some("top"), Some("r"), None]);
}

#[test]
fn faults_have_the_protocols_texts() {
    for (text, expected) in [
        ("{}", "Parameter 'driver' is missing"),
        (
            r#"{"driver":"nope"}"#,
            "Parameter 'driver' does not accept value 'nope'",
        ),
        (r#"{"driver":"qcow2"}"#, "Parameter 'file' is missing"),
        (
            r#"{"driver":"raw","file":{"driver":"file"}}"#,
            "Parameter 'file.filename' is missing",
        ),
        (
            r#"{"driver":"raw","file":"f","foo":1}"#,
            "Parameter 'foo' is unexpected",
        ),
        (
            r#"{"driver":"raw","file":"f","discard":"bogus"}"#,
            "Parameter 'discard' does not accept value 'bogus'",
        ),
        (
            r#"{"driver":"null-co","size":"x"}"#,
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            r#"{"driver":"null-co","size":-1}"#,
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            r#"{"driver":"file","filename":""}"#,
            "Could not open '': No such file or directory",
        ),
        (
            r#"{"driver":"raw","file":"f","detect-zeroes":"unmap"}"#,
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
    ] {
        assert_eq!(json(text).unwrap_err(), expected, "{text}");
    }
}

#[test]
fn nodes_nest_so_deep_and_no_deeper() {
    let nested = |depth: usize| {
        let mut options: Vec<(String, Scalar)> = (0..depth)
            .map(|level| (format!("{}driver", "file.".repeat(level)), "raw".into()))
            .collect();
        options.push((format!("{}driver", "file.".repeat(depth)), "null-co".into()));
        NodeOptions::parse(FlatOptions(options))
    };
    assert!(nested(MAX_NESTING - 1).is_ok());
    assert!(matches!(nested(MAX_NESTING), Err(GraphError::TooDeep(_))));
}
