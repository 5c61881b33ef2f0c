# Reads names of loads, one a line, and runs them in turn.
echo "@READY"
while read -r name argument; do
  [ "$name" = quit ] && break
  sh /bench/items.sh "$name" $argument 2>&1 </dev/null
done
