cd /tmp/bt
for i in 1 2; do rm -rf .soup-store; export T0=$(date +%s.%N); $PY tl.py run tree.yaml -q --force --executor processes:8 ; $PY -c "import time,os; print('end', time.time()-float(os.environ['T0']))"; done
for i in 1; do rm -rf .soup-store; export R=1 T0=$(date +%s.%N); $PY tl.py run tree.yaml -q --force --executor processes:8 ; $PY -c "import time,os; print('end', time.time()-float(os.environ['T0']))"; done
