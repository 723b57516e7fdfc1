//! What a filter leaves to the node below it.

/// Writes the methods of [`Node`](super::Node) that only ask the node in a field for the same:
/// `passes!(child: flush, bytes, status);` in the `impl`. Each is named, so that nothing goes past a filter by itself.
macro_rules! passes {
    ($below:ident: $($method:ident),+ $(,)?) => { $(passes!(@$method $below);)+ };
    (@read $below:ident) => {
        fn read(&self, offset: u64, into: $crate::buffer::Segments) -> $crate::node::NodeFuture<'_> {
            self.$below.read(offset, into)
        }
    };
    (@write_zeroes $below:ident) => {
        fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> $crate::node::NodeFuture<'_> {
            self.$below.write_zeroes(offset, bytes, may_unmap)
        }
    };
    (@discard $below:ident) => {
        fn discard(&self, offset: u64, bytes: u64) -> $crate::node::NodeFuture<'_> {
            self.$below.discard(offset, bytes)
        }
    };
    (@flush $below:ident) => {
        fn flush(&self) -> $crate::node::NodeFuture<'_> {
            self.$below.flush()
        }
    };
    (@bytes $below:ident) => {
        fn bytes(&self) -> u64 {
            self.$below.bytes()
        }
    };
    (@status $below:ident) => {
        fn status(&self, offset: u64, bytes: u64) -> $crate::node::NodeFuture<'_, $crate::node::Extent> {
            self.$below.status(offset, bytes)
        }
    };
    (@below $below:ident) => {
        fn below(&self) -> Option<::std::rc::Rc<dyn $crate::node::Node>> {
            self.$below.below()
        }
    };
    (@resize $below:ident) => {
        fn resize(
            &self,
            bytes: u64,
            preallocation: ::ipc::graph::Preallocation,
        ) -> $crate::node::NodeFuture<'_, (), ::ipc::Failure> {
            self.$below.resize(bytes, preallocation)
        }
    };
    (@limits $below:ident) => {
        fn limits(&self) -> $crate::node::Limits {
            self.$below.limits()
        }
    };
    (@details $below:ident) => {
        fn details(&self) -> $crate::node::NodeFuture<'_, ::ipc::graph::NodeDetails> {
            self.$below.details()
        }
    };
    (@event $below:ident) => {
        fn event(&self, event: $crate::node::event::Event) -> Option<$crate::node::event::Held> {
            self.$below.event(event)
        }
    };
}
